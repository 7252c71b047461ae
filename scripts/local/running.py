"""What local mode has running: read from the supervisor's file, trusted only where pid and start time agree."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .places import Places

NAME = "appliance"
GRACE_SECONDS = 200.0  # above the sum of what its services may take


@dataclass(frozen=True, slots=True)
class Running:
    """One supervisor's file. Processes that no longer are what the file says are not in `alive`."""

    file: Path
    told: dict[str, Any]

    @property
    def supervisor(self) -> psutil.Process | None:
        return _same(self.told.get("supervisor"))

    def alive(self) -> dict[str, psutil.Process]:
        """Services whose process still is the one that was started."""
        found = {name: _same(told) for name, told in self.told.get("services", {}).items()}
        return {name: process for name, process in found.items() if process is not None}

    @property
    def ports(self) -> dict[str, int]:
        return dict(self.told.get("ports", {}))

    def restarts(self) -> dict[str, int]:
        return {name: int(told["restarts"]) for name, told in self.told.get("services", {}).items()}

    def last_exit(self, name: str) -> int | None:
        value = self.told.get("services", {}).get(name, {}).get("last_exit")
        return int(value) if value is not None else None


def running(places: Places, name: str = NAME) -> Running | None:
    """What the supervisor of that name told last; None when there is no such file."""
    file = places.run / f"{name}.json"
    try:
        return Running(file, json.loads(file.read_text()))
    except (OSError, ValueError):
        return None


def stop(places: Places, name: str = NAME) -> list[str]:
    """End the supervisor and everything it kept; the names of services that had to be killed or were orphans."""
    found = running(places, name)
    if found is None:
        return []
    supervisor = found.supervisor
    forced: list[str] = []
    if supervisor is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor.send_signal(signal.SIGTERM)
            with contextlib.suppress(psutil.TimeoutExpired):
                supervisor.wait(GRACE_SECONDS)
            if supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
                forced.append("supervisor")
                supervisor.kill()
                supervisor.wait(10)
    # The supervisor removes its file at the end. If it was killed, its children are still there.
    left = running(places, name)
    if left is not None:
        forced += _end_orphans(left)
        left.file.unlink(missing_ok=True)
    return forced


def _end_orphans(left: Running) -> list[str]:
    orphans = left.alive()
    for process in orphans.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + 30
    for process in orphans.values():
        with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own
    return list(orphans)


def _same(told: Any) -> psutil.Process | None:
    if not told or told.get("created") is None:
        return None
    try:
        process = psutil.Process(int(told["pid"]))
        # The time is reckoned from the boot's, which moves by a second when the clock is adjusted; a pid that was given
        # again started much later.
        if abs(process.create_time() - float(told["created"])) > 2.0 or process.status() == psutil.STATUS_ZOMBIE:
            return None
    except psutil.NoSuchProcess:
        return None
    return process
