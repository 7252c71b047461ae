"""What is measured of one gateway in one round. Load comes from C: wrk for JSON calls, streams.c for streams."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import machine
from tests.bench.gateways import KEY, PATH
from tests.bench.machine import LOAD_CORE, Process, pinned

STREAMS, EVENTS, PACE_MS = 256, 100, 20  # 256 live streams with 50 events a second each
IDLE_STREAMS = 2000


@dataclass
class Target:
    """A started gateway, or the double itself."""

    name: str
    port: int
    process: Process
    exact: bool = True
    scheme: str = "http"


@dataclass
class Used:
    """CPU seconds and wall seconds between two looks; `others` is what neither gateway nor load used, in cores."""

    cpu: float
    wall: float
    others: float


class Watch:
    """Measures what a target used while a block ran."""

    def __init__(self, target: Target, double: Process) -> None:
        self._target, self._double = target, double
        self._at = time.monotonic()
        self._cpu = target.process.cpu_seconds()
        self._known = self._cpu + (0 if target.process is double else double.cpu_seconds())
        self._all = machine.stolen()

    def used(self, load_cpu: float) -> Used:
        """Since the watch was made; `load_cpu` is what the load generator used."""
        wall = time.monotonic() - self._at
        cpu = self._target.process.cpu_seconds()
        known = cpu + (0 if self._target.process is self._double else self._double.cpu_seconds())
        others = machine.stolen() - self._all - (known - self._known) - load_cpu
        return Used(cpu - self._cpu, wall, max(0.0, others / wall))


def _run(argv: list[str], seconds: float) -> tuple[str, float]:
    """Output and CPU seconds of a load generator."""
    before = os.times()
    done = subprocess.run(
        pinned(LOAD_CORE, argv), capture_output=True, text=True, timeout=seconds, env={**os.environ, "BENCH_KEY": KEY}
    )
    after = os.times()
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed: {done.stderr[-400:]}")
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return done.stdout, used


def calls(target: Target, double: Process, connections: int, seconds: float) -> dict[str, Any]:
    """JSON calls a second with `connections` connections, their latency, the gateway's CPU for each."""
    script = Path(__file__).parent / "call.lua"
    watch = Watch(target, double)
    out, load = _run(
        ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "20s", "-s", str(script),
         f"{target.scheme}://127.0.0.1:{target.port}{PATH}"], seconds + 60,
    )  # fmt: skip
    used = watch.used(load)
    said = json.loads(out.strip().splitlines()[-1])
    return {
        "calls_s": said["calls"] / said["seconds"],
        "p50_ms": said["p50_ms"],
        "p99_ms": said["p99_ms"],
        "errors": said["errors"],
        "cpu_us": used.cpu / max(1, said["calls"]) * 1e6,
        "calls_per_cpu_s": said["calls"] / max(1e-6, used.cpu),
        "others": used.others,
    }


def streams(target: Target, double: Process, count: int, pace_ms: int, seconds: float) -> dict[str, Any]:
    """`count` streams at once for `seconds`: events, CPU, time to first byte, gaps, lost or changed bytes."""
    watch = Watch(target, double)
    out, load = _run(
        [str(machine.build("streams")), str(target.port), PATH, KEY, "bench", str(count), str(EVENTS), str(pace_ms),
         f"{seconds:g}", "1000" if pace_ms else "0", "1" if target.exact else "0"], seconds + 120,
    )  # fmt: skip
    used = watch.used(load)
    said = json.loads(out)
    return {
        "events_s": said["events"] / said["seconds"],
        "cpu_percent": used.cpu / used.wall * 100,
        "cpu_us_event": used.cpu / said["events"] * 1e6 if said["events"] else math.nan,
        "ttft_p50_ms": said["ttft_ms"]["p50"],
        "ttft_p99_ms": said["ttft_ms"]["p99"],
        "gap_p50_ms": said["gap_ms"]["p50"],
        "gap_p99_ms": said["gap_ms"]["p99"],
        "behind_percent": max(0.0, 100 * (said["total_ms"]["p50"] / max(1, pace_ms * (EVENTS + 1)) - 1)),
        "wrong": said["wrong"],
        "broken": said["broken"] + said["refused"] + said["unfinished"],
        "finished": said["finished"],
        "others": used.others,
    }


def idle_memory(target: Target, count: int = IDLE_STREAMS) -> dict[str, float]:
    """Resident memory of one stream that is open and silent, kB, over `count` of them."""
    before = target.process.rss_mb()
    argv = [
        str(machine.build("streams")),
        str(target.port),
        PATH,
        KEY,
        "bench",
        str(count),
        "1",
        "15000",
        "1",
        "2000",
        "0",
    ]
    client = subprocess.Popen(pinned(LOAD_CORE, argv), stdout=subprocess.DEVNULL)
    try:
        wanted = count * 0.99

        def connected() -> bool:
            total = sum(
                1
                for p in target.process.tree()
                for c in p.net_connections("tcp")
                if c.status == "ESTABLISHED" and c.laddr.port == target.port
            )
            return total >= wanted

        machine.wait_for(f"{count} streams through {target.name}", connected, 30)
        time.sleep(1.0)  # let the first events pass
        return {"kb": (target.process.rss_mb() - before) * 1e3 / count, "rss_mb": target.process.rss_mb()}
    finally:
        client.kill()
        client.wait()


def measure(target: Target, double: Process, connections: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Everything that is measured in one round."""
    result: dict[str, Any] = {"calls": {}, "streams": {}}
    for count in connections:
        result["calls"][str(count)] = calls(target, double, count, seconds)
    result["streams"]["paced"] = streams(target, double, STREAMS, PACE_MS, seconds * 2)
    for count in (64, 512):
        result["streams"][f"flood {count}"] = streams(target, double, count, 0, seconds)
    result["rss_mb"] = target.process.rss_mb()
    return result
