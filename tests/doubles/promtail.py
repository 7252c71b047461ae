"""Runs promtail/promtail.yml over log lines, as Promtail and Alloy would: no binary of theirs can be had everywhere.

Only the stages that the file uses are known; any other raises, so that a change of the file is noticed. `Promtail.serve`
answers /metrics with the metrics that the file's stages define.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONFIG = Path(__file__).parents[2] / "promtail/promtail.yml"
LABELS = ("class", "level", "service")  # an empty one is no label to Prometheus
TEMPLATES = {
    "{{ ToLower .Value }}": str.lower,
    "{{ if .Value }}{{ .Value }}xx{{ end }}": lambda value: f"{value}xx" if value else "",
}


@cache
def _read(config: Path) -> dict[str, Any]:
    return yaml.safe_load(config.read_text())


@dataclass
class Entry:
    """One entry as Loki gets it, and what the stages found in it on the way."""

    line: str
    labels: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


class Promtail:
    """The pipeline of the file's one job. `sent` collects the entries."""

    def __init__(self, config: Path = CONFIG) -> None:
        self.config = _read(config)
        (job,) = self.config["scrape_configs"]
        self.stages: list[dict[str, Any]] = job["pipeline_stages"]
        self.registry = CollectorRegistry()
        self.metrics: dict[str, Any] = {}
        self.sent: list[Entry] = []

    def ship(self, service: str, lines: Iterable[str]) -> list[Entry]:
        """Send the lines of one container; returns its entries."""
        entries = [Entry(line, {"service": service}) for line in lines]
        shipped = list(self._run(self.stages, entries))
        self.sent += shipped
        return shipped

    def _run(self, stages: list[dict[str, Any]], entries: Iterable[Entry]) -> Iterator[Entry]:
        stream = iter(entries)
        for stage in stages:
            ((name, options),) = stage.items()
            stream = getattr(self, f"_{name}")(options, stream)
        return stream

    def _match(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        selector = re.fullmatch(r'\{service(=~?)"([^"]+)"\}', options["selector"])
        assert selector, f"selector {options['selector']} is not understood"
        wanted = re.compile(selector[2] if selector[1] == "=~" else re.escape(selector[2]))
        for service, group in _by_service(entries):
            yield from self._run(options["stages"], group) if wanted.fullmatch(service) else group

    def _multiline(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        first = re.compile(options["firstline"])
        block: Entry | None = None
        for entry in entries:
            if block is None or first.search(entry.line) or block.line.count("\n") + 1 >= options["max_lines"]:
                if block is not None:
                    yield block
                block = entry
            else:
                block.line += "\n" + entry.line
        if block is not None:
            yield block

    def _replace(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        expression = re.compile(options["expression"])

        def masked(match: re.Match[str]) -> str:
            start, end = (place - match.start() for place in match.span(1))
            return match[0][:start] + options["replace"] + match[0][end:]

        for entry in entries:
            entry.line = expression.sub(masked, entry.line)
            yield entry

    def _json(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            try:
                record = json.loads(entry.line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                entry.found |= {
                    name: record[path] for name, path in options["expressions"].items() if record.get(path) is not None
                }
            yield entry

    def _regex(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        expression = re.compile(options["expression"])
        for entry in entries:
            text = entry.found.get(options["source"], "") if "source" in options else entry.line
            if match := expression.search(str(text)):
                entry.found |= match.groupdict()
            yield entry

    def _template(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        template = TEMPLATES[options["template"]]
        for entry in entries:
            value = template(str(entry.found.get(options["source"], "")))
            entry.found.pop(options["source"], None)
            if value:
                entry.found[options["source"]] = value
            yield entry

    def _labels(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            entry.labels |= {name: str(entry.found[name]) for name in options if name in entry.found}
            yield entry

    def _labeldrop(self, options: list[str], entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            for name in options:
                entry.labels.pop(name, None)
            yield entry

    def _structured_metadata(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            entry.metadata |= {name: str(entry.found[name]) for name in options if name in entry.found}
            yield entry

    def _metrics(self, options: dict[str, Any], entries: Iterator[Entry]) -> Iterator[Entry]:
        for entry in entries:
            for name, metric in options.items():
                if metric["source"] in entry.found:
                    self._count(name, metric, entry)
            yield entry

    def _count(self, name: str, metric: dict[str, Any], entry: Entry) -> None:
        full = metric["prefix"] + name
        if full not in self.metrics:
            kind = {"Counter": Counter, "Gauge": Gauge, "Histogram": Histogram}[metric["type"]]
            extra = {"buckets": metric["config"]["buckets"]} if metric["type"] == "Histogram" else {}
            self.metrics[full] = kind(full, metric["description"], LABELS, registry=self.registry, **extra)
        child = self.metrics[full].labels(*(entry.labels.get(label, "") for label in LABELS))
        value = float(entry.found[metric["source"]]) if metric["config"].get("action") != "inc" else 1.0
        if metric["type"] == "Histogram":
            child.observe(value)
        elif metric["config"]["action"] == "set":
            child.set(value)
        else:
            child.inc(value)

    def serve(self) -> PromtailPage:
        """Answer /metrics on a free port until closed."""
        return PromtailPage(self)


class PromtailPage:
    """The /metrics page of a pipeline."""

    def __init__(self, promtail: Promtail) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = generate_latest(promtail.registry)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


def _by_service(entries: Iterator[Entry]) -> Iterator[tuple[str, Iterator[Entry]]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.labels["service"], []).append(entry)
    for service, group in groups.items():
        yield service, iter(group)
