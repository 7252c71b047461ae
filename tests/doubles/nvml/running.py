"""The real exporter as a process, for tests that look at it from outside."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families
from tests.doubles.nvml.scenario import Scenario
from tests.doubles.waiting import PATIENCE, wait_until

# A sample that is slow on a busy machine is no hang, and a hang is told for longer than a test may look away.
HANGING = {"GPU_DEADLINE_SECONDS": "3", "GPU_RETRY_SECONDS": "1.5"}

T = TypeVar("T")
QUICK = {
    "GPU_SAMPLE_SECONDS": "0.1",
    "GPU_RETRY_SECONDS": "0.1",
    "GPU_DEADLINE_SECONDS": "20",
    "GPU_EXPORTER_PORT": "0",
}


class Exporter:
    """`gpu-exporter` with a port of its own; use it as a context manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GPU_", "METRIC_NAMES", "DEMO"))}
        self.logs: list[dict[str, Any]] = []
        self._environment = {**clean, **QUICK, **environment}

    def __enter__(self) -> Exporter:
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("gpu-exporter"))], env=self._environment, stdout=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.event("listening")["port"])
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(timeout=PATIENCE)
        self._reader.join(timeout=PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.logs.append(json.loads(line))

    def event(self, name: str, **fields: Any) -> dict[str, Any]:
        """The first log line of that event with those fields, waiting for it."""

        def logged() -> dict[str, Any] | None:
            return next((x for x in list(self.logs) if x["event"] == name and fields.items() <= x.items()), None)

        return waited(f"log event {name} {fields}", logged)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> dict[str, Any]:
        """A JSON answer."""
        found: dict[str, Any] = json.loads(self.get(path)[1])
        return found

    def page(self) -> Page:
        """One scrape."""
        return Page(self.get("/metrics")[1].decode())

    def until(self, what: str, holds: Callable[[Page], object]) -> Page:
        """Scrape until `holds`; `what` is said when it never does."""

        def seen() -> Page | None:
            page = self.page()
            return page if holds(page) else None

        return waited(what, seen)

    def next_sample(self) -> Page:
        """The page after two more samples: everything changed before is in it."""
        done = self.page().value("gpu_exporter_collects_total") or 0
        return self.until("two more samples", lambda page: (page.value("gpu_exporter_collects_total") or 0) >= done + 2)


class Page:
    """A scrape, parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.name.startswith("process_")
        ]

    def names(self) -> set[str]:
        """The names of all series."""
        return {sample.name for sample in self.samples}

    def values(self, name: str, **labels: str) -> list[float]:
        """The values of the series with that name and those labels."""
        return [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]

    def value(self, name: str, **labels: str) -> float | None:
        """The value of the only such series, or None when there is none."""
        found = self.values(name, **labels)
        assert len(found) <= 1, f"{name} {labels}: {found}"
        return found[0] if found else None

    def state(self) -> str:
        """The state that the exporter says it is in."""
        return next(s.labels["state"] for s in self.samples if s.name == "gpu_exporter_state" and s.value == 1)


def started(scenario: Scenario, library: Path, **environment: str) -> Exporter:
    """An exporter on the double that `library` is, with the machine of `scenario`."""
    return Exporter({**scenario.environment(library), **environment})


def collecting(page: Page) -> bool:
    """Whether the last sample was one."""
    return page.state() == "ok"


def waited(what: str, found: Callable[[], T | None]) -> T:
    """The first answer of `found` that is not None; fails saying `what` was waited for."""
    answers: list[T] = []

    def there() -> bool:
        answer = found()
        if answer is not None:
            answers.append(answer)
        return bool(answers)

    wait_until(what, there)
    return answers[0]
