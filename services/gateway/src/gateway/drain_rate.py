"""How fast the room drains, and the promises made by `Retry-After`. Pure; time is passed in (seconds).

A refused caller is told when a place will be free for it: after everybody who was told before. Such a promise is kept:
while it is due, its place is not given to a newcomer. Callers that do not come back lose it after a grace time. To keep
the engines busy whatever the absent do, newcomers are held back only while the room is more than half full.
"""

from __future__ import annotations

import math
from collections import deque

MEMORY_SECONDS = 10.0  # older observations fade with this time constant
ENOUGH = 3.0  # observations before the measured rate is believed
CAUTION = 1.1  # promised waits are this much longer than expected
SHORTEST, LONGEST = 1, 60  # seconds; official clients give up when told more
GRACE_SECONDS = 3.0  # clients come back late: network, jitter, a timer of whole seconds
EARLY_SECONDS = 0.25  # … or a little early


class DrainRate:
    """Calls and tokens that leave a second, measured while calls wait; before that, expected from service times."""

    def __init__(self, places: int) -> None:
        self.places = places
        self._calls = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._last: float | None = None  # while calls wait
        self._mean_seconds: float | None = None  # that a call holds its place
        self._mean_tokens = 0.0

    def served(self, seconds: float, tokens: float) -> None:
        """A call gave its place back after `seconds`, having used `tokens`."""
        if self._mean_seconds is None:
            self._mean_seconds, self._mean_tokens = seconds, tokens
        else:
            self._mean_seconds += (seconds - self._mean_seconds) * 0.1
            self._mean_tokens += (tokens - self._mean_tokens) * 0.1

    def admitted(self, cost: float, now: float) -> None:
        """A waiting call of `cost` tokens got its place."""
        self.busy(now)
        self._calls += 1.0
        self._tokens += cost

    def busy(self, now: float) -> None:
        """Calls wait: time counts."""
        if self._last is not None:
            passed = now - self._last
            fade = math.exp(-passed / MEMORY_SECONDS)
            self._calls *= fade
            self._tokens *= fade
            self._seconds = self._seconds * fade + passed
        self._last = now

    def idle(self) -> None:
        """Nobody waits: time does not count."""
        self._last = None

    def calls_per_second(self, now: float) -> float:
        """The rate at which places become free; above 0."""
        if self._last is not None:
            self.busy(now)
        if self._calls >= ENOUGH and self._seconds > 0:
            return max(self._calls / self._seconds, 1 / LONGEST)
        if self._mean_seconds:
            return max(self.places / self._mean_seconds, 1 / LONGEST)
        return 1.0

    def tokens_per_second(self, now: float) -> float:
        """The rate of tokens with the same meaning; above 0."""
        calls = self.calls_per_second(now)
        if self._calls >= ENOUGH:
            return max(1.0, self._tokens / self._calls * calls)
        return max(1.0, self._mean_tokens * calls)

    @property
    def measured(self) -> bool:
        """Whether the rate rests on observations of a waiting room that drained."""
        return self._calls >= ENOUGH


class Promises:
    """Places that were promised to keys for a time to come. At most `most` at once for one key."""

    def __init__(self, most: int) -> None:
        self._most = max(4, most)
        self._due: dict[str, deque[float]] = {}
        self._count = 0

    def outstanding(self, now: float) -> int:
        """Promises that are neither kept nor lost."""
        for key in [key for key, due in self._due.items() if due[0] + GRACE_SECONDS < now]:
            due = self._due[key]
            while due and due[0] + GRACE_SECONDS < now:
                due.popleft()
                self._count -= 1
            if not due:
                del self._due[key]
        return self._count

    def make(self, key: str, rate: float, now: float, at_least: float = 0.0) -> float:
        """Promise the next place that is not promised yet, at `rate` places a second; seconds to wait, whole."""
        wait = max((self.outstanding(now) + 1) / rate * CAUTION, at_least)
        seconds = min(LONGEST, max(SHORTEST, math.ceil(wait)))
        due = self._due.setdefault(key, deque())
        if len(due) < self._most:
            # In order even if the rate has grown: the first to be told is the first to be due.
            due.append(max(now + seconds, due[-1] if due else 0.0))
            self._count += 1
        return float(seconds)

    def keep(self, key: str, now: float) -> bool:
        """Whether `key` comes back on a promise that is due; it is kept by this."""
        self.outstanding(now)
        due = self._due.get(key)
        if due is None or due[0] - EARLY_SECONDS > now:
            return False
        due.popleft()
        self._count -= 1
        if not due:
            del self._due[key]
        return True
