"""One circuit breaker an engine: closed, open, half-open with a single probe. Pure; time is passed in (seconds).

| state | a result says | what happens |
|---|---|---|
| closed | failure | counted; `failures` in a row open it |
| closed | success, or an answer that goes on | the count starts again |
| open | | for `seconds`, doubled with every failed probe up to eight times, nothing is sent |
| half-open | | one call is let through as the probe; the others stay away |
| half-open | success | closed |
| half-open | failure | open again, for longer |
| half-open | the probe ended without a result (the caller left), or has none after `seconds` | another may go |

A call's success is told as soon as the engine shows it, at its first token, and not when its answer is whole.
"""

from __future__ import annotations

from enum import IntEnum

LONGEST = 8.0  # times `seconds`


class BreakerState(IntEnum):
    """The values are those of the metric `gateway_breaker_state`."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Counts results. `failures` in a row open it; after `seconds` one probe decides."""

    __slots__ = ("_count", "_failures", "_opened_at", "_probed_at", "_probing", "_seconds", "_stretch")

    def __init__(self, failures: int, seconds: float) -> None:
        self._failures = failures
        self._seconds = seconds
        self._count = 0
        self._opened_at: float | None = None
        self._stretch = 1.0
        self._probing = False
        self._probed_at = 0.0

    def state(self, now: float) -> BreakerState:
        """The state at `now`."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self.seconds_left(now) <= 0 else BreakerState.OPEN

    def seconds_left(self, now: float) -> float:
        """Seconds until a probe is allowed; 0 when closed or half-open."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._seconds * self._stretch - now)

    def allows(self, now: float) -> bool:
        """Whether a call may be sent now."""
        if self._opened_at is None:
            return True
        if self._probing and now - self._probed_at < self._seconds:
            return False
        return self.seconds_left(now) <= 0

    def take(self, now: float) -> bool:
        """A call is sent; returns whether it is the probe. Pair a probe with a result or with `release`."""
        if self._opened_at is None:
            return False
        self._probing = True
        self._probed_at = now
        return True

    def release(self) -> None:
        """The probe ended without a result."""
        self._probing = False

    def succeed(self) -> bool:
        """A call was answered. Returns whether the breaker closed by it."""
        self._count = 0
        if self._opened_at is None or not self._probing:
            # While it is open only the probe decides: an answer to an older call says nothing about new ones.
            return False
        self._close()
        return True

    def flow(self) -> None:
        """An older answer goes on: the engine is not failing altogether."""
        self._count = 0

    def fail(self, now: float) -> bool:
        """A call failed. Returns whether the breaker opened by it."""
        if self._opened_at is not None:
            if not self._probing:
                return False
            self._probing = False
            self._opened_at = now
            self._stretch = min(LONGEST, self._stretch * 2)
            return True
        self._count += 1
        if self._count < self._failures:
            return False
        self._opened_at = now
        return True

    def recover(self) -> None:
        """The engine came back from being down: what it did before counts no more."""
        self._close()

    def _close(self) -> None:
        self._count = 0
        self._opened_at = None
        self._stretch = 1.0
        self._probing = False

    def __repr__(self) -> str:
        return f"<Breaker failures={self._count} opened_at={self._opened_at} probing={self._probing}>"
