"""How fast the room drains: measured while calls wait, and before that, expected. Pure; time is passed in (seconds)."""

from __future__ import annotations

import math

MEMORY_SECONDS = 10.0  # older observations fade with this time constant
FIRST_GUESS_SECONDS = 2.0  # that a call holds its place, until one has ended
ENOUGH = 3.0  # observations before the measured rate is believed
SLOWEST = 1 / 60  # calls a second


class Pace:
    """Calls that get a place for each second in which some wait; of everybody, or of one key."""

    __slots__ = ("_at", "_calls", "_seconds", "_waiting")

    def __init__(self) -> None:
        self._calls = 0.0
        self._seconds = 0.0
        self._waiting = False
        self._at = 0.0  # up to when everything is counted

    def admitted(self, now: float) -> None:
        """A waiting call got its place."""
        self._count(now)
        self._calls += 1.0

    def busy(self, now: float) -> None:
        """Calls wait: time counts."""
        self._count(now)
        self._waiting = True

    def idle(self, now: float) -> None:
        """Nobody waits: time does not count."""
        self._count(now)
        self._waiting = False

    def measured(self, now: float) -> float | None:
        """Calls a second, above 0; None when too little was observed lately."""
        self._count(now)
        if self._calls < ENOUGH or self._seconds <= 0:
            return None
        return max(self._calls / self._seconds, SLOWEST)

    def _count(self, now: float) -> None:
        passed = now - self._at
        self._at = now
        fade = math.exp(-passed / MEMORY_SECONDS)
        self._calls *= fade
        self._seconds *= fade
        if self._waiting:
            self._seconds += passed


class DrainRate(Pace):
    """The pace of everybody. Where it is not measured, the times that calls take say what `places` can do."""

    __slots__ = ("_granted", "_mean_seconds", "_running", "places")

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places
        self._mean_seconds: float | None = None  # that a call holds its place
        self._running = 0
        self._granted = 0.0  # sum of the times at which running calls got their places

    def granted(self, now: float) -> None:
        """A call got a place."""
        self._running += 1
        self._granted += now

    def left(self, granted: float) -> None:
        """A call that got its place at `granted` gave it back."""
        self._running -= 1
        self._granted = self._granted - granted if self._running else 0.0

    def served(self, seconds: float) -> None:
        """A call was answered: it held its place for `seconds`."""
        if self._mean_seconds is None:
            self._mean_seconds = seconds
        else:
            self._mean_seconds += (seconds - self._mean_seconds) * 0.1

    def calls_per_second(self, now: float) -> float:
        """The rate at which places become free; above 0."""
        if (measured := self.measured(now)) is not None:
            return measured
        # Calls that run now and are older than calls used to become say that these take longer.
        age = now - self._granted / self._running if self._running else 0.0
        expected = max(FIRST_GUESS_SECONDS if self._mean_seconds is None else self._mean_seconds, age)
        return max(self.places / max(expected, 0.001), SLOWEST)
