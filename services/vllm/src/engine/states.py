"""The engine's states as a table, and what may follow what. Pure: the supervisor is the only one who moves it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class State(StrEnum):
    """What the engine is doing, as callers, metrics and people see it."""

    STARTING = "starting"  # a child runs and does not answer yet, or the next one waits for its turn
    READY = "ready"
    DEGRADED = "degraded"  # answers, but slower than it should: the canary is late
    HUNG = "hung"  # no progress: evidence is taken, then the child is killed
    STOPPING = "stopping"
    FAILED = "failed"  # not started again until the cause is mended or the window of restarts has passed


class Phase(StrEnum):
    """The parts of a start, in order."""

    FETCH = "fetch"
    WEIGHTS = "weights"
    COMPILE = "compile"
    WARM_UP = "warm-up"


class Reason(StrEnum):
    """Why a child was replaced: the label of `engine_restarts_total`."""

    CRASHED = "crashed"  # ended by itself
    KILLED = "killed"  # ended by a signal that was not ours
    HUNG = "hung"
    ENGINE_DEAD = "engine_dead"  # the API server lives and says that its engine does not
    START_FAILED = "start_failed"
    START_TIMEOUT = "start_timeout"


FOLLOWS: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.FAILED, State.STOPPING}),
    State.READY: frozenset({State.DEGRADED, State.HUNG, State.STARTING, State.FAILED, State.STOPPING}),
    State.DEGRADED: frozenset({State.READY, State.HUNG, State.STARTING, State.FAILED, State.STOPPING}),
    State.HUNG: frozenset({State.STARTING, State.FAILED, State.STOPPING}),
    State.FAILED: frozenset({State.STARTING, State.STOPPING}),
    State.STOPPING: frozenset(),
}
SERVING = frozenset({State.READY, State.DEGRADED})


class Life:
    """The current state with its cause and age, and the phases of the current start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.state = State.STARTING
        self.since = clock()
        self.reason: str | None = None
        self.phase: Phase | None = None
        self.phase_seconds: dict[Phase, float] = {}
        self._phase_since = self.since

    def move(self, state: State, reason: str | None = None) -> bool:
        """Go to `state`; False if already there. Raises `ValueError` for a step that the table does not have."""
        if state is self.state:
            self.reason = reason or self.reason
            return False
        if state not in FOLLOWS[self.state]:
            raise ValueError(f"{self.state} is never followed by {state}")
        self.state, self.since, self.reason = state, self._clock(), reason
        if state is not State.STARTING:
            self._close_phase()
        return True

    def enter(self, phase: Phase) -> bool:
        """Note the phase of a start; phases only go forward. Whether it is a new one."""
        order = list(Phase)
        if self.phase is not None and order.index(phase) <= order.index(self.phase):
            return False
        self._close_phase()
        self.phase, self._phase_since = phase, self._clock()
        return True

    def restart(self) -> None:
        """A new start begins: its phases are counted anew."""
        self.phase, self.phase_seconds = None, {}

    def _close_phase(self) -> None:
        if self.phase is not None:
            self.phase_seconds[self.phase] = self._clock() - self._phase_since
            self.phase = None if self.state is not State.STARTING else self.phase
