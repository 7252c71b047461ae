"""Once a second: memory, descriptors, threads, series, disk; and whether they grow."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import time
from pathlib import Path
from typing import TypedDict

from gateway.store import Database, StoreUnavailable
from tests.soak.site import Site


class Sample(TypedDict):
    """One second. Bytes, counts; `at` in seconds since the start; `life` tells gateways apart."""

    at: float
    life: int
    rss: int
    descriptors: int
    threads: int
    series: int
    database: int
    log: int
    spool: int
    nginx_rss: int
    nginx_descriptors: int
    cpu: float


def _status(process: int, name: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(name)


def _size(folder: Path, pattern: str) -> int:
    total = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _database(site: Site) -> int:
    url = site.gateway.environment["DATABASE_URL"]
    if url.startswith("sqlite"):
        return _size(site.state, "*.sqlite3*")
    with Database(url).session() as database:
        return int(database.rows("SELECT pg_database_size(current_database())")[0][0])


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _series(site: Site) -> int:
    exposition = site.gateway.get("/metrics", key=None).body
    return sum(1 for line in exposition.splitlines() if line and not line.startswith(b"#"))


def sample(site: Site, began: float) -> Sample | None:
    """What is now; None while the gateway is between two lives."""
    process = site.gateway.process
    if process is None:
        return None
    try:
        gateway = process.pid
        edge = site.nginx_processes()
        return Sample(
            at=time.monotonic() - began,
            life=site.gateway.lives,
            rss=_status(gateway, "VmRSS") * 1024,
            descriptors=len(os.listdir(f"/proc/{gateway}/fd")),
            threads=_status(gateway, "Threads"),
            series=_series(site),
            database=_database(site),
            log=site.gateway.log.stat().st_size,
            spool=_size(site.state, "spool*/**/*"),
            nginx_rss=sum(_status(one, "VmRSS") for one in edge) * 1024,
            nginx_descriptors=sum(len(os.listdir(f"/proc/{one}/fd")) for one in edge),
            cpu=_cpu(gateway),
        )
    except (OSError, LookupError, http.client.HTTPException, StoreUnavailable):
        return None


class Sampler:
    """Fills `samples` until cancelled."""

    def __init__(self, site: Site) -> None:
        self.samples: list[Sample] = []
        self._site = site
        self._began = time.monotonic()

    async def run(self) -> None:
        while True:
            taken = await asyncio.to_thread(sample, self._site, self._began)
            if taken is not None:
                self.samples.append(taken)
            await asyncio.sleep(1)


def slope(points: list[tuple[float, float]]) -> float:
    """The least-squares line's rise a second. Theil-Sen would cost n²; a line over thousands of points is steady."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
