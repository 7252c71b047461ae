"""Keeps local mode's processes: starts them, starts them again, stops them in order. One owner of all of them.

Runs detached (`python -m scripts.local.supervisor NAME`), takes its plan from standard input, so that no secret in an
environment is ever written down, and tells what it does in `run/NAME.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from services.init import edge_local

LOG_BYTES = 50 * 1024 * 1024  # a log grows to this and is then kept once as NAME.log.1
BACKOFF_SECONDS = (0.5, 1, 2, 4, 8, 15, 30)
STEADY_SECONDS = 60.0  # a process that lived this long starts again without a wait
WATCH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Service:
    """One process: how it starts, how it is asked to end, how long it may take."""

    name: str
    argv: list[str]
    environment: dict[str, str]
    stop_signal: str = "SIGTERM"
    stop_seconds: float = 40.0
    depends_on: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """Everything one supervisor keeps. `edge` are the arguments of `edge_local.refresh`, if nginx is among them."""

    state: str
    services: list[Service]
    edge: dict[str, Any] | None = None
    ports: dict[str, int] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)  # folders outside the state folder, removed at the end

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> Plan:
        raw = json.loads(text)
        raw["services"] = [Service(**service) for service in raw["services"]]
        return Plan(**raw)


class Keeper:
    """Owns the processes of one plan."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.plan = plan
        self.file = Path(plan.state, "run", f"{name}.json")
        self.logs = Path(plan.state, "logs")
        # What is written for this plan and for no other: another supervisor has the same folder.
        self.written = [
            self.logs / f"{one}.log" for one in (*(each.name for each in plan.services), f"{name}-supervisor")
        ]
        if plan.edge is not None:
            self.written.append(Path(plan.edge["edge"]["access_log"]))
        self.stopping = asyncio.Event()
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.restarts = dict.fromkeys((service.name for service in plan.services), 0)
        self.last_exit: dict[str, int] = {}

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self.stopping.set)
        keepers = {service.name: asyncio.create_task(self.keep(service)) for service in self.plan.services}
        watcher = asyncio.create_task(self.watch())
        await self.stopping.wait()
        watcher.cancel()
        for service in reversed(self.plan.services):
            await self.stop(service)
            await keepers[service.name]
        await asyncio.gather(watcher, return_exceptions=True)
        for folder in self.plan.remove:
            shutil.rmtree(folder, ignore_errors=True)
        self.file.unlink(missing_ok=True)

    async def keep(self, service: Service) -> None:
        """One process, started again with growing waits whenever it ends."""
        failures = 0
        while not self.stopping.is_set():
            started = time.monotonic()
            with (self.logs / f"{service.name}.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(
                    *service.argv,
                    env=service.environment,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a group of its own: its children end with it
                )
            self.processes[service.name] = process
            self.tell()
            if self.stopping.is_set():  # it came while we were told to end
                await self.stop(service)
            self.last_exit[service.name] = await process.wait()
            _kill_group(process.pid)  # what it may have left behind
            if self.stopping.is_set():
                return
            failures = 0 if time.monotonic() - started > STEADY_SECONDS else failures + 1
            self.restarts[service.name] += 1
            self.tell()
            wait = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), wait)

    async def stop(self, service: Service) -> None:
        """Ask, wait, and kill the whole group when it does not end in time."""
        process = self.processes.get(service.name)
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.Signals[service.stop_signal])
        try:
            await asyncio.wait_for(process.wait(), service.stop_seconds)
        except TimeoutError:
            _kill_group(process.pid)
            await process.wait()

    async def watch(self) -> None:
        """Take over a changed certificate, keep logs bounded."""
        told = ""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for log in self.written:
                _bound(log)
            nginx = self.processes.get("nginx")
            if self.plan.edge is None or nginx is None:
                continue
            try:
                changed = await asyncio.to_thread(edge_local.refresh, **self.plan.edge)
            except Exception as problem:
                # Whatever is wrong with a user's file: what runs goes on.
                if str(problem) != told:  # say it once, not every few seconds
                    told = str(problem)
                    print(json.dumps({"event": "certificate_refused", "problem": told}), flush=True)
                continue
            told = ""
            if changed and nginx.returncode is None:
                nginx.send_signal(signal.SIGHUP)

    def tell(self) -> None:
        """Write what runs, in one step."""
        told = {
            "supervisor": _identity(os.getpid()),
            "ports": self.plan.ports,
            "services": {
                name: {
                    **_identity(process.pid),
                    "running": process.returncode is None,
                    "restarts": self.restarts[name],
                    "last_exit": self.last_exit.get(name),
                }
                for name, process in self.processes.items()
            },
        }
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(told))
        fresh.replace(self.file)


def _identity(pid: int) -> dict[str, float | int | None]:
    """A pid with its start time: pids are used again, pairs are not."""
    try:
        return {"pid": pid, "created": psutil.Process(pid).create_time()}
    except psutil.NoSuchProcess:
        return {"pid": pid, "created": None}


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _bound(log: Path) -> None:
    with contextlib.suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)  # writers append, so they go on at the new end


def main() -> None:
    """Read the plan and keep it."""
    plan = Plan.load(sys.stdin.read())
    asyncio.run(Keeper(sys.argv[1], plan).run())


if __name__ == "__main__":
    main()
