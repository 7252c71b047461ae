"""`engine node`: this machine's part in a model that another machine serves.

Runs one Ray node, watched: it ends with the head's (each run of vLLM has a cluster of its own) and is started again
until the next one takes it. It never gives up, since the first machine may be away for as long as it likes.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from engine import cluster, command, family
from engine.child import Child
from engine.command import Place
from engine.metrics import Metrics
from engine.restarts import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS
from engine.settings import Settings
from engine.states import Life, Reason, State

_GOOD_SECONDS = 30.0  # a node that was in for so long begins again with the shortest wait
_END_SECONDS = 10.0


class Node:
    """Owns this machine's Ray node from `run` to the end of `run`."""

    def __init__(
        self, settings: Settings, place: Place, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._place, self._metrics, self._clock = settings, place, metrics, clock
        self.life = Life(clock)
        self._stop = asyncio.Event()
        self._restarts = 0
        self._last_line = ""

    def stop(self) -> None:
        """Leave the cluster and end."""
        self._stop.set()

    def retry(self) -> None:
        """Nothing to do: it tries again by itself."""

    def status(self) -> dict[str, Any]:
        """What `/status` shows; ready means that this machine is in the cluster."""
        return {
            "state": self.life.state.value,
            "ready": self.life.state is State.READY,
            "since_seconds": round(self._clock() - self.life.since, 1),
            "reason": self.life.reason,
            "phase": None,
            "line": self._last_line,
            "restarts": self._restarts,
            "head": f"{self._settings.ray_head_address}:{self._settings.ray_port}",
        }

    async def run(self) -> None:
        """Join, and join again, until `stop`."""
        family.adopt_orphans()
        state_dir = self._settings.engine_state_dir.expanduser().absolute()
        base = command.environment(self._settings, self._place, os.environ, state_dir, "")
        env, argv = cluster.environment(self._settings, base), cluster.argv(self._settings, self._place)
        wait = FIRST_WAIT_SECONDS
        stopping = asyncio.create_task(self._stop.wait())
        while not self._stop.is_set():
            self._move(State.STARTING)
            logger.bind(argv=argv).info("node_starting")
            started = self._clock()
            child = await Child.start(argv, env, self._heard)
            ended = asyncio.create_task(child.ended())
            try:
                await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if self._stop.is_set():
                    self._move(State.STOPPING)
                    child.drain()
                    await asyncio.wait({ended}, timeout=_END_SECONDS)
                    break
                words = f"left the cluster (code {ended.result()}): {self._last_line}"
            finally:
                await child.sweep()
                ended.cancel()
            self._restarts += 1
            self._metrics.restarts.labels(Reason.CRASHED.value).inc()
            wait = (
                FIRST_WAIT_SECONDS if self._clock() - started > _GOOD_SECONDS else min(2 * wait, LONGEST_WAIT_SECONDS)
            )
            self._move(State.STARTING, words)
            logger.bind(cause=words, wait=wait).warning("node_ended")
            await asyncio.wait({stopping}, timeout=wait)
        stopping.cancel()
        self._move(State.STOPPING)

    def _heard(self, line: str) -> None:
        self._last_line = line
        if cluster.JOINED in line and self.life.state is State.STARTING:
            self._move(State.READY)

    def _move(self, state: State, reason: str | None = None) -> None:
        before = self.life.state
        if self.life.move(state, reason):
            logger.bind(before=before.value, state=state.value, reason=reason).info("node_state")
        self._metrics.show(self.life.state)
