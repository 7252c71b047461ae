"""What administrators and misfortune do meanwhile: keys, restarts, kills, hangs, reloads, backups."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from scripts.daytwo import carrier
from scripts.daytwo.archive import Manifest, read, write

from tests.soak.site import Site
from tests.soak.traffic import Keys

PASSING_KEYS = 12  # made, changed, rotated and deleted in turn


class Deeds:
    """Runs them on a timetable in seconds; `done` counts, `problems` are deeds that failed and must not."""

    def __init__(self, site: Site, keys: Keys, seed: int) -> None:
        self.site, self.keys = site, keys
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.engine_kills = 0
        self.gateway_kills = 0
        self._chance = random.Random(seed)
        self._alive: dict[str, str] = {}  # id → secret
        self._gateway, self._engine = asyncio.Lock(), asyncio.Lock()  # one hand on each at a time
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @staticmethod
    def steady(site: Site, daily_tokens: int) -> Keys:
        """The keys that stay: without limits, with a daily quota, with a rate, with one call at a time, in a team."""
        wanted = {
            "free": {}, "quota": {"daily_tokens": daily_tokens}, "rate": {"requests_per_minute": 40},
            "one": {"concurrency": 1}, "team": {"organisation": "team", "priority": "high", "daily_tokens": 2**40},
        }  # fmt: skip
        made = {}
        for name, limits in wanted.items():
            status, key = site.gateway.admin_json("POST", "/admin/keys", {"name": name, **limits})
            assert status == 201, key
            made[name] = key["secret"]
            site.secrets.add(key["secret"])
        return Keys(made)

    def start(self, restarts_until: float, every: dict[str, float]) -> None:
        """`every`: deed → seconds between two; after `restarts_until` seconds the gateway is left alone, once
        each way of ending it was tried."""
        deeds: dict[str, Callable[[], Awaitable[None]]] = {
            "keys": self.change_keys, "parallel keys": self.parallel_keys, "backup": self.backup,
            "engine restart": self.restart_engine, "engine kill": self.kill_engine, "engine hang": self.hang_engine,
            "gateway restart": self.restart_gateway, "gateway kill": self.kill_gateway, "reload": self.reload,
        }  # fmt: skip
        ends = time.monotonic() + restarts_until
        if not self.site.gateway.environment["DATABASE_URL"].startswith("sqlite"):
            deeds.pop("backup")  # `make backup` leaves PostgreSQL to pg_dump
        for name, seconds in every.items():
            if name not in deeds:
                continue
            until = ends if name.startswith("gateway") else None
            self._tasks.append(asyncio.create_task(self._repeat(name, deeds[name], seconds, until)))

    async def stop(self) -> None:
        """No new deed; the running ones end."""
        self._over.set()
        async with asyncio.timeout(90):
            await asyncio.gather(*self._tasks)

    async def _repeat(
        self, name: str, deed: Callable[[], Awaitable[None]], seconds: float, until: float | None
    ) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds * self._chance.uniform(0.6, 1.4)):
                    await self._over.wait()
            if self._over.is_set() or (until is not None and time.monotonic() > until and self.done[name]):
                return
            try:
                await deed()
            except Exception as problem:
                # One thing that went wrong is told with all that was measured; it must not cost the hour.
                self.problems.append(f"{name}: {type(problem).__name__}: {problem}")
                continue
            self.done[name] += 1

    async def _admin(self, method: str, path: str, body: object, expected: tuple[int, ...]) -> dict | None:
        """One admin request; what the gateway's own restarts break does not count."""
        lives = self.site.gateway.lives
        try:
            status, told = await asyncio.to_thread(self.site.gateway.admin_json, method, path, body)
        except (OSError, http.client.HTTPException):
            if self.site.gateway.lives == lives and not self._gateway.locked():
                self.problems.append(f"{method} {path}: the connection broke")
            return None
        if status not in expected and not self._gateway.locked() and self.site.gateway.lives == lives:
            self.problems.append(f"{method} {path.rpartition('/')[0]}: {status} {told}")
        return told if status in expected else None

    async def change_keys(self) -> None:
        """Make one, change one, rotate one, delete the oldest."""
        limits = {"requests_per_minute": 200, "daily_tokens": 10**9}
        made = await self._admin("POST", "/admin/keys", {"name": "passing", **limits}, (201,))
        if made:
            self._use(made["id"], made["secret"])
        if not self._alive:
            return
        some = self._chance.choice(list(self._alive))
        await self._admin("PATCH", f"/admin/keys/{some}", {"tokens_per_minute": 10**6, "weight": 2}, (200,))
        rotated = await self._admin("POST", f"/admin/keys/{some}/rotate", {"grace_seconds": 3600}, (200,))
        if rotated:
            self._use(some, rotated["secret"])
        for verb in ("disable", "enable"):
            await self._admin("POST", f"/admin/keys/{some}/{verb}", None, (200,))
        if len(self._alive) > PASSING_KEYS:
            oldest = next(iter(self._alive))
            await self._admin("DELETE", f"/admin/keys/{oldest}", None, (204,))
            self._alive.pop(oldest)
            self.keys.passing = list(self._alive.values())

    async def parallel_keys(self) -> None:
        """Eight at once."""
        made = await asyncio.gather(
            *(self._admin("POST", "/admin/keys", {"name": f"parallel {n}"}, (201,)) for n in range(8))
        )
        for key in made:
            if key:
                self.site.secrets.add(key["secret"])
                await self._admin("DELETE", f"/admin/keys/{key['id']}", None, (204,))

    def _use(self, key_id: str, secret: str) -> None:
        self._alive[key_id] = secret
        self.site.secrets.add(secret)
        self.keys.passing = list(self._alive.values())

    async def backup(self) -> None:
        """A verified copy while serving, as `make backup` makes it."""
        await asyncio.to_thread(self._backup)

    def _backup(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.site.folder) as folder:
            stream, target = Path(folder) / "state.tar", Path(folder) / "backup.tar"
            with stream.open("wb") as file:
                carrier.export({"state": self.site.state}, file)
            with stream.open("rb") as file:
                write(target, file, Manifest("now", "soak", "local"))
            manifest, _ = read(target, Path(folder))
            if not any("usage_records" in tables for tables in manifest.tables.values()):
                self.problems.append("a backup without a ledger")

    async def restart_engine(self) -> None:
        async with self._engine:
            await asyncio.to_thread(self._engine_again, self.site.engine.stop)

    async def kill_engine(self) -> None:
        async with self._engine:
            self.engine_kills += 1
            await asyncio.to_thread(self._engine_again, self.site.engine.kill)

    def _engine_again(self, end: Callable[[], None]) -> None:
        end()
        self.site.engine.start()

    async def hang_engine(self) -> None:
        """Two seconds without a sign of life, under every call that runs."""
        engine = self.site.engine
        async with self._engine:
            engine.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(2)
            finally:
                engine.signal(signal.SIGCONT)

    async def restart_gateway(self) -> None:
        """SIGTERM, a drain, a start."""
        async with self._gateway:
            status = await asyncio.to_thread(self.site.gateway.terminate, 25)
            if status != 0:
                self.problems.append(f"the gateway ended with {status}")
            await asyncio.to_thread(self.site.gateway.start, False)

    async def kill_gateway(self) -> None:
        """SIGKILL, a start."""
        async with self._gateway:
            self.gateway_kills += 1
            await asyncio.to_thread(self.site.gateway.kill)
            await asyncio.to_thread(self.site.gateway.start, False)

    async def reload(self) -> None:
        """nginx takes its configuration and certificate again."""
        self.site.edge.reload()
