"""How fast the room drains, and the promises made by `Retry-After`. Pure; time is passed in (seconds).

A refused caller is told when a place will be free for it: after everybody who was told before. Such a promise is kept:
while it is due, its place is not given to a newcomer. Callers that do not come back lose it after a grace time. To keep
the engines busy whatever the absent do, newcomers are held back only while the room is more than half full.
"""

from __future__ import annotations

import heapq
import math

MEMORY_SECONDS = 10.0  # older observations fade with this time constant
FIRST_GUESS_SECONDS = 2.0  # that a call holds its place, until one has ended
ENOUGH = 3.0  # observations before the measured rate is believed
# Promised waits are longer than expected by a factor that learns: newcomers of light keys come first, whatever was
# promised. It settles where one promise in twenty is broken.
LEAST_CAUTION, MOST_CAUTION = 1.1, 4.0
BROKEN, KEPT = 1.05, 0.9974
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

    def served(self, seconds: float, tokens: float) -> None:
        """A call was answered: it held its place for `seconds` and used `tokens`."""
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
        # Calls that run now and are older than calls used to become say that these take longer.
        age = now - self._granted / self._running if self._running else 0.0
        expected = max(FIRST_GUESS_SECONDS if self._mean_seconds is None else self._mean_seconds, age)
        return max(self.places / max(expected, 0.001), 1 / LONGEST)

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
    """Places that were promised for a time to come, to a key and a `mark` by which the same request is known again.

    Promises are shared between keys like places: the n-th promise of a key stands behind n promises of every other key
    that has as many. A key that asks again and again pushes only its own future away.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Line] = {}
        self._count = 0
        self._caution = LEAST_CAUTION

    def outstanding(self, now: float) -> int:
        """Promises that are neither kept nor lost."""
        for key, line in list(self._of.items()):
            self._count -= line.forget(now - GRACE_SECONDS)
            if not line.count:
                del self._of[key]
        return self._count

    def make(self, key: str, mark: int, rate: float, now: float, at_least: float = 0.0) -> float:
        """Promise the next place that is not promised yet, at `rate` places a second; seconds to wait, whole."""
        total = self.outstanding(now)
        line = self._of.get(key)
        own = line.count if line is not None else 0
        ahead = min(total, max(1, own) * len(self._of))
        seconds = min(LONGEST, max(SHORTEST, math.ceil(max((ahead + 1) / rate * self._caution, at_least))))
        if own < rate * LONGEST * 2:
            if line is None:
                line = self._of[key] = _Line()
            line.add(mark, now + seconds)
            self._count += 1
        return float(seconds)

    def keep(self, key: str, mark: int, now: float) -> bool:
        """Whether the request `mark` of `key` comes back on a promise that is due; it is kept by this."""
        self.outstanding(now)
        line = self._of.get(key)
        if line is None or not line.take(mark, now + EARLY_SECONDS):
            return False
        self._count -= 1
        if not line.count:
            del self._of[key]
        self._caution = max(LEAST_CAUTION, self._caution * KEPT)
        return True

    def broke(self) -> None:
        """A promise could not be kept, or a caller was sent away after it had been let in."""
        self._caution = min(MOST_CAUTION, self._caution * BROKEN)


class _Line:
    """The promises of one key: when they are due, by mark and by time."""

    __slots__ = ("_by_mark", "_heap", "count")

    def __init__(self) -> None:
        self.count = 0
        self._by_mark: dict[int, list[float]] = {}
        self._heap: list[tuple[float, int]] = []

    def add(self, mark: int, due: float) -> None:
        self.count += 1
        heapq.heappush(self._by_mark.setdefault(mark, []), due)
        heapq.heappush(self._heap, (due, mark))

    def take(self, mark: int, until: float) -> bool:
        """Use the earliest promise of `mark` if it is due by `until`."""
        dues = self._by_mark.get(mark)
        if not dues or dues[0] > until:
            return False
        self._drop(mark, dues)
        return True

    def forget(self, before: float) -> int:
        """Drop promises that were due before; how many."""
        dropped = 0
        while self._heap and self._heap[0][0] < before:
            due, mark = heapq.heappop(self._heap)
            dues = self._by_mark.get(mark)
            if dues and dues[0] <= due:  # else it has been kept
                self._drop(mark, dues)
                dropped += 1
        return dropped

    def _drop(self, mark: int, dues: list[float]) -> None:
        heapq.heappop(dues)
        self.count -= 1
        if not dues:
            del self._by_mark[mark]
