"""The single owner of vLLM: starts it, watches it, takes evidence, ends it whole, starts it again, or says why not.

One task runs all of it in order; the status page and the metrics only read. `restarts.py` decides whether and when the
next start comes, `watchdog.py` whether the engine hangs; this file carries the decisions out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from loguru import logger

from engine import cause, command, evidence, family, place, progress, seeds, stacks
from engine.child import Child
from engine.cluster import Cluster, keep_here
from engine.command import Place
from engine.metrics import Metrics
from engine.probe import Canary, Probe
from engine.restarts import Restarts
from engine.settings import Settings
from engine.states import SERVING, Life, Phase, Reason, State
from engine.watchdog import Verdict, Watchdog

TICK_SECONDS = 1.0
_START_TICK_SECONDS = 0.5
_AFTER_DRAIN_SECONDS = 10.0  # vLLM's own shutdown after the last call
_COMPILES = re.compile(
    r"Warming up model|torch\.compile|Compiling|[Cc]apturing CUDA graph|Dynamo bytecode|AOT compiled"
)


@dataclass(frozen=True)
class End:
    """How a run of vLLM ended."""

    reason: Reason
    words: str
    was_ready: bool
    again: bool  # whether another start may help


class Supervisor:
    """Owns vLLM from `run` to the end of `run`. `stop` may be called at any time, twice to hurry."""

    def __init__(self, settings: Settings, place: Place, metrics: Metrics, clock: Callable[[], float] = time.monotonic):
        self._settings, self._place, self._metrics, self._clock = settings, place, metrics, clock
        self.life = Life(clock)
        self._restarts = Restarts(settings.engine_restarts, settings.engine_restart_window_seconds)
        self._child: Child | None = None
        self._cluster: Cluster | None = None
        self._token = secrets.token_hex(16)
        self._state_dir = settings.engine_state_dir.expanduser().absolute()
        self._last_line = ""
        self._last_lines: list[str] = []
        self._last_evidence: Path | None = None
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._retry = asyncio.Event()

    def stop(self) -> None:
        """Drain and end; called again, end at once."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    def retry(self) -> None:
        """Start again now, also out of `failed`."""
        self._restarts.forget()
        self._retry.set()

    def status(self) -> dict[str, Any]:
        """What `/status` shows."""
        life, now = self.life, self._clock()
        return {
            "state": life.state.value,
            "ready": life.state in SERVING,
            "since_seconds": round(now - life.since, 1),
            "reason": life.reason,
            "phase": life.phase.value if life.phase else None,
            "phase_seconds": {phase.value: round(seconds, 1) for phase, seconds in life.phase_seconds.items()},
            "line": self._last_line,
            "last_lines": self._last_lines[-20:] if life.state is State.FAILED else [],
            "restarts": self._restarts.count,
            "evidence": str(self._last_evidence) if self._last_evidence else None,
            "model": self._place.served[0],
            "device": self._place.device,
            "tensor_parallel": self._place.tp,
        }

    async def run(self) -> None:
        """Everything, until `stop`."""
        family.adopt_orphans()  # should the guard be killed, whoever it held falls to us
        self._move(State.STARTING)
        while not self._stop.is_set():
            self.life.enter(Phase.FETCH)
            problem = await self._unless_stopped(self._fetch())
            if self._stop.is_set():
                break
            # A model that could not be fetched may be there in a minute; one that is not allowed will not be.
            end = End(Reason.START_FAILED, problem, False, True) if problem else await self._one_run()
            if end is None or not await self._wait_for_turn(end):
                break
        self._move(State.STOPPING)

    async def _fetch(self) -> str | None:
        """Bring the model here if it is missing; why that failed, or None. A process, so that it can be ended."""
        if place.is_present(self._place.model):
            return None
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "engine", "fetch"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            said = "engine fetch printed nothing"
            while process.stdout is not None and (raw := await process.stdout.readline()):
                said = self._last_line = raw.decode("utf-8", "replace").strip().removeprefix("engine fetch: ")
                logger.bind(text=said).info("model_fetch")
            return said if await process.wait() != 0 else None
        finally:
            if process.returncode is None:
                await asyncio.to_thread(family.kill, process.pid)
                await process.wait()

    async def _one_run(self) -> End | None:
        """One vLLM from start to end, in its cluster if it has one; None when it was us who wanted the end."""
        self._install_plugin()
        env = command.environment(self._settings, self._place, os.environ, self._state_dir, self._token)
        if self._settings.ray_head_address is None:
            return await self._one_vllm(env)
        keep_here(self._state_dir)
        async with Cluster(self._settings, self._place, env, self._heard) as gathered:
            problem = await self._unless_stopped(gathered.gather())
            if self._stop.is_set():
                return None
            if problem is not None:
                return End(Reason.START_FAILED, problem, False, True)
            self._cluster = gathered
            try:
                return await self._one_vllm(env)
            finally:
                self._cluster = None

    async def _one_vllm(self, env: dict[str, str]) -> End | None:
        argv = command.argv(self._settings, self._place)
        logger.bind(argv=argv).info("engine_starting")
        self.life.enter(Phase.WEIGHTS)
        child = self._child = await Child.start(argv, env, self._heard)
        ended = asyncio.create_task(child.ended())
        stopping = asyncio.create_task(self._stop.wait())
        key = self._settings.vllm_api_key
        secret = key.get_secret_value() if key else None
        try:
            async with Probe(
                self._settings.vllm_host, self._settings.vllm_port, secret, self._token, self._place.served[0]
            ) as probe:
                watch = asyncio.create_task(self._watch(child, probe))
                try:
                    await asyncio.wait({ended, stopping, watch}, return_when=asyncio.FIRST_COMPLETED)
                    if self._stop.is_set():
                        watch.cancel()  # a drain is no hang
                        await self._drain(child, ended)
                        return None
                    if watch.done():
                        return watch.result()
                    return self._ended_by_itself(child, await ended)
                finally:
                    watch.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await watch
        finally:
            await child.sweep()
            self._last_lines = list(child.lines)
            for task in (ended, stopping):
                task.cancel()
            self._child = None

    async def _watch(self, child: Child, probe: Probe) -> End:
        """From the first try to reach the child until something is wrong with it."""
        deadline = self._clock() + self._settings.engine_start_seconds
        while await probe.health() != 200:
            if self._clock() > deadline:
                words = f"vLLM did not answer within {self._settings.engine_start_seconds:g} s (ENGINE_START_SECONDS)"
                return End(Reason.START_TIMEOUT, words, False, True)
            await asyncio.sleep(_START_TICK_SECONDS)
        self.life.enter(Phase.WARM_UP)
        try:
            warm = await probe.warm_up(max(deadline - self._clock(), 1.0))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return End(Reason.START_FAILED, f"the first request failed: {type(error).__name__}: {error}", False, True)
        settings = self._settings
        dog = Watchdog(
            self._clock(),
            hang=settings.engine_hang_seconds,
            most=settings.engine_hang_most_seconds,
            canary=settings.engine_canary_seconds,
            prefill_rate=warm.prefill_rate if warm else 0.0,
            longest_tokens=warm.longest_tokens if warm else 8192,
        )
        dog.canary_works = warm is not None
        self._metrics.prefill_rate.set(warm.prefill_rate if warm else 0.0)
        child.note_shared_memory()
        self._move(State.READY)
        self._metrics.started(self.life.phase_seconds)
        logger.bind(seconds=self.life.phase_seconds, prefill_rate=warm and round(warm.prefill_rate)).info(
            "engine_ready"
        )
        return await self._guard_progress(child, probe, dog)

    async def _guard_progress(self, child: Child, probe: Probe, dog: Watchdog) -> End:
        canary: asyncio.Task[None] | None = None
        try:
            while True:
                dog.tick(self._clock(), TICK_SECONDS)
                reading = await probe.look()
                now = self._clock()
                dog.look(now, reading)
                if reading is not None:
                    self._metrics.calls.set(reading.calls)
                if (canary is None or canary.done()) and dog.wants_canary(now):
                    dog.canary_sent(now)
                    canary = asyncio.create_task(self._send_canary(probe, dog))
                verdict = dog.verdict(now)
                self._metrics.suspicion.set(dog.suspicion(now))
                self._metrics.bound.set(dog.bound())
                suspicious = verdict is not Verdict.HEALTHY and reading is not None
                if suspicious and await probe.health() == 503:
                    return End(Reason.ENGINE_DEAD, "vLLM's API server says that its engine died", True, True)
                if verdict is Verdict.HUNG:
                    return await self._hung(child, dog, now)
                late = f"no token for {dog.suspicion(now):.0f} s" if verdict is Verdict.LATE else None
                self._move(State.DEGRADED if late else State.READY, late)
                await asyncio.sleep(TICK_SECONDS)
        finally:
            if canary is not None:
                canary.cancel()

    async def _send_canary(self, probe: Probe, dog: Watchdog) -> None:
        started = self._clock()
        outcome = await probe.canary(self._settings.engine_hang_most_seconds)
        now = self._clock()
        if outcome is Canary.BACK:
            self._metrics.canary_seconds.observe(now - started)
            dog.canary_back(now)
        elif outcome is Canary.UNSUPPORTED:
            dog.canary_works = False
            logger.warning("canary_unsupported")
        else:
            self._metrics.canaries_lost.inc()

    async def _hung(self, child: Child, dog: Watchdog, now: float) -> End:
        words = f"no progress for {dog.suspicion(now):.0f} s, bound {dog.bound():.0f} s"
        self._move(State.HUNG, words)
        facts = {"reason": words, "status": self.status(), "bound_seconds": dog.bound(), "model": self._place.served[0]}
        env = command.environment(self._settings, self._place, os.environ, self._state_dir, "")
        members = child.members() + (self._cluster.members() if self._cluster else [])
        with contextlib.suppress(OSError):  # a full disk must not keep a dead engine
            self._last_evidence = await evidence.take(
                self._state_dir / "evidence", "hung", facts, list(child.lines), members, env
            )
        return End(Reason.HUNG, words, True, True)

    def _ended_by_itself(self, child: Child, code: int) -> End:
        words, again = cause.of(list(child.lines), code)
        if self.life.state is State.STARTING:
            return End(Reason.START_FAILED, words, False, again)
        return End(Reason.KILLED if code > 128 else Reason.CRASHED, words, True, True)

    async def _drain(self, child: Child, ended: asyncio.Task[int]) -> None:
        was_serving = self.life.state in SERVING
        self._move(State.STOPPING)
        child.drain()
        # vLLM ignores SIGTERM while it starts, and has nothing to drain then.
        patience = self._settings.engine_drain_seconds + _AFTER_DRAIN_SECONDS if was_serving else 2.0
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({ended, hurry}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        logger.bind(drained=ended.done()).info("engine_stopped")

    async def _wait_for_turn(self, end: End) -> bool:
        """Tell how the run ended, then wait until the next start is due; False when we are to stop."""
        self._metrics.restarts.labels(end.reason.value).inc()
        turn = self._restarts.after(self._clock(), end.was_ready, end.again, end.words)
        logger.bind(reason=end.reason.value, cause=end.words, wait=turn.wait).error("engine_ended")
        self.life.restart()
        self._move(State.FAILED if turn.failed else State.STARTING, end.words)
        if turn.failed:
            logger.bind(cause=end.words, last_lines=self._last_lines[-20:]).error("engine_failed")
        self._retry.clear()
        waits = [asyncio.create_task(self._stop.wait()), asyncio.create_task(self._retry.wait())]
        await asyncio.wait(waits, timeout=turn.wait, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if self._stop.is_set():
            return False
        self._move(State.STARTING, end.words)
        return True

    async def _unless_stopped(self, work: Awaitable[str | None]) -> str | None:
        task, stop = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return None
        return task.result()

    def _heard(self, line: str) -> None:
        self._last_line = line
        if self.life.state is State.STARTING and self.life.phase is Phase.WEIGHTS and _COMPILES.search(line):
            self.life.enter(Phase.COMPILE)

    def _move(self, state: State, reason: str | None = None) -> None:
        before = self.life.state
        if self.life.move(state, reason):
            logger.bind(before=before.value, state=state.value, reason=reason).info("engine_state")
        self._metrics.show(self.life.state)

    def _install_plugin(self) -> None:
        plugin = self._state_dir / "plugin"
        plugin.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(progress.__file__), plugin / f"{command.PROGRESS_MODULE}.py")
        shutil.copyfile(Path(stacks.__file__), plugin / "sitecustomize.py")
        shutil.copyfile(Path(seeds.__file__), plugin / "engine_seeds.py")
        described = plugin / "engine_seeds-1.dist-info"  # how vLLM finds its plugins
        described.mkdir(exist_ok=True)
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-seeds\nVersion: 1\n")
        (described / "entry_points.txt").write_text(seeds.ENTRY_POINT)
