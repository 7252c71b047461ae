"""Prometheus and what it scrapes, as real processes on free ports, and a collector of traces that can misbehave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.doubles.ports import free_ports
from tests.doubles.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus is not on PATH (Debian: apt-get install prometheus)"
)


WORDS = frozenset(
    {"sum", "rate", "increase", "max", "min", "avg", "count", "topk", "time", "vector", "abs", "changes"}
    | {"histogram_quantile", "predict_linear", "avg_over_time", "max_over_time"}
    | {"and", "or", "unless", "by", "without", "on", "ignoring", "bool"}
)


def families(expr: str) -> set[str]:
    """The metric names in a query; a choice of names (`__name__=~`) gives each."""
    names = set()
    for choice in re.findall(r'__name__=~"([^"]+)"', expr):
        names |= {name.replace("(_total)?", "") for name in choice.split("|") if name != ".+"}
    bare = re.sub(r'"[^"]*"', '""', expr)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    bare = re.sub(r"\[[^\]]*\]|\boffset\s+\w+|\b[\d.]+(e\d+)?\b", " ", bare)
    names |= {name for name in re.findall(r"[a-zA-Z_:][\w:]*", bare) if name not in WORDS}
    return names


def fetch(url: str, form: dict[str, str] | None = None, accept: str = "*/*") -> str:
    """The text at `url`; with `form` by POST. An error status is returned as its text, too."""
    data = urllib.parse.urlencode(form).encode() if form is not None else None
    request = urllib.request.Request(url, data, {"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def up(url: str, with_text: str = "") -> bool:
    """Whether `url` answers, with this in its text."""
    try:
        return with_text in fetch(url)
    except OSError:
        return False


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str
    folder: Path

    def get(self, path: str, **form: str) -> Any:
        """The `data` of an API answer; raises AssertionError with the server's words when it is an error."""
        answer = json.loads(fetch(f"{self.url}/api/v1/{path}", form or None))
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series that `expr` gives now."""
        found = self.get("query", query=expr)
        return found["result"] if found["resultType"] == "vector" else [found]

    def empty(self, expr: str) -> bool:
        """Whether the query gives nothing, or nothing but NaN."""
        return all(series.get("value", [0, "NaN"])[1] == "NaN" for series in self.query(expr))

    def firing(self) -> set[str]:
        """Names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}


@contextlib.contextmanager
def prometheus(folder: Path, impatient: bool = False, **addresses: str) -> Iterator[Prometheus]:
    """The real configuration for these jobs, scraped and evaluated every second.

    `impatient` takes the waiting times (`for:`) out of the alerts.
    """
    assert PROMETHEUS is not None
    (port,) = free_ports(1)
    jobs = [f"{job}={address}" for job, address in {**addresses, "prometheus": f"127.0.0.1:{port}"}.items()]
    render = [sys.executable, str(ROOT / "prometheus/render"), "--out", str(folder), "--interval", "1s", *jobs]
    subprocess.run(render, check=True)
    if impatient:
        for path in (folder / "rules").glob("*.yml"):
            path.write_text(re.sub(r"^( +)for: .*$", r"\1for: 0s", path.read_text(), flags=re.M))
    config = folder / "prometheus.yml"
    assert yaml.safe_load(config.read_text())["rule_files"] == ["rules/*.yml"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=log,
        )
        running = Prometheus(f"http://127.0.0.1:{port}", folder)
        try:
            wait_until("Prometheus is ready", lambda: up(f"{running.url}/-/ready", "is Ready"))
            yield running
        finally:
            process.terminate()
            process.wait(PATIENCE)


@contextlib.contextmanager
def gpu_exporter(**environment: str) -> Iterator[str]:
    """The exporter on simulated GPUs; gives its address."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu_exporter"],
        env={"PATH": os.environ["PATH"], "DEMO": "2xH100", "GPU_EXPORTER_PORT": str(port), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until("the exporter answers", lambda: up(f"http://127.0.0.1:{port}/metrics"))
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE)


class Collector:
    """Takes OTLP/HTTP as Jaeger does. `mute`: takes the connection and never answers, as a hung one does."""

    def __init__(self, mute: bool = False) -> None:
        self.bodies: list[bytes] = []
        self._over = threading.Event()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                if mute:
                    collector._over.wait(60)
                    return
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Page:
    """A page of metrics that the test writes: for a program that is not part of this run."""

    def __init__(self, text: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = text.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
