"""The machine under the benchmark: cores, processes, what they used."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
STATE = Path(os.environ.get("APPLIANCE_STATE", ROOT / ".state")) / "bench"
CORES = sorted(os.sched_getaffinity(0))
GATEWAY_CORE, LOAD_CORE = CORES[0], CORES[-1]  # one core for the gateway, another for the load and the double


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pinned(core: int, argv: list[str]) -> list[str]:
    """`argv` on one core."""
    return ["taskset", "-c", str(core), *argv]


def wait_for(what: str, condition: Callable[[], bool], seconds: float) -> None:
    """Poll `condition`; raise `TimeoutError` naming `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def answers(url: str, key: str | None = None) -> bool:
    """Whether a GET of `url` is answered with 200."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


class Process:
    """A process tree on one core (None: on any), with its log in a file."""

    def __init__(
        self, name: str, argv: list[str], core: int | None, folder: Path, environment: dict[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.log = folder / f"{name}.log"
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                argv if core is None else pinned(core, argv),
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self.root = psutil.Process(self.popen.pid)

    def tree(self) -> list[psutil.Process]:
        """The process and all its children."""
        try:
            return [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """CPU time used so far by the tree."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def rss_mb(self) -> float:
        """Resident memory of the tree, MB."""
        total = 0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total / 1e6

    def stop(self) -> None:
        """End the whole tree."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGTERM)
            try:
                self.popen.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()


def build(name: str) -> Path:
    """Compile tests/bench/NAME.c if it changed; the program's path."""
    source = Path(__file__).parent / f"{name}.c"
    program = STATE / name
    newest = max(source.stat().st_mtime, (source.parent / "events.h").stat().st_mtime)
    if not program.exists() or program.stat().st_mtime < newest:
        STATE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O2", "-Wall", "-o", program, source], check=True)
    return program


def _sync_ms() -> list[float]:
    """How long the disk takes to keep 12 kB, which is what a commit waits for: median and 99th percentile."""
    STATE.mkdir(parents=True, exist_ok=True)
    taken = []
    with tempfile.TemporaryFile(dir=STATE) as file:
        for _ in range(200):
            file.write(bytes(12_000))
            file.flush()
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            taken.append((time.perf_counter() - start) * 1e3)
    taken.sort()
    return [round(taken[100], 2), round(taken[197], 2)]


def _python(program: str) -> str:
    """Which interpreter runs the gateway: its version and where it was installed."""
    asked = "import sys; print(sys.version.split()[0], sys.base_prefix)"
    version, place = subprocess.check_output([program, "-c", asked], text=True).split()
    return f"{version} of {place}"


def describe(python: str) -> dict[str, Any]:
    """What the figures were taken on; `python` runs the gateway."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": len(CORES),
        "kernel": platform.release(),
        "python": _python(python),
        "sync_ms": _sync_ms(),
        "load_average": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def stolen() -> float:
    """CPU seconds that all processes of the machine together have used so far (to see how disturbed a round was)."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq + times.steal)
