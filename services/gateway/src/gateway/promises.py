"""The promises made by `Retry-After`, and whether they are kept. Pure; time is passed in (seconds).

A refused caller is told when there will be room for it: behind everybody of its key who was told before. While such a
promise is due its place is not given to a newcomer (see `Capacity`). Callers that do not come back lose it after a
grace time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

CAUTION = 1.1  # promised waits are longer than expected by this factor: rates are measured, and change
SHORTEST, LONGEST = 1, 60  # seconds; official clients give up when told more
GRACE_SECONDS = 3.0  # clients come back late: network, jitter, a timer of whole seconds
EARLY_SECONDS = 0.25  # … or a little early


class Promises:
    """Places that were promised for a time to come, to a key and a `mark` by which the same request is known again.

    Each key has its own line: one that asks again and again pushes only its own future away.
    """

    def __init__(self) -> None:
        self._of: dict[str, _Line] = {}
        self._count = 0

    def outstanding(self, now: float) -> int:
        """Promises that are neither kept nor lost."""
        for key, line in list(self._of.items()):
            self._count -= line.forget(now - GRACE_SECONDS)
            if not line.count:
                del self._of[key]
        return self._count

    def of(self, key: str) -> int:
        """Those of them that were made to `key`."""
        line = self._of.get(key)
        return line.count if line is not None else 0

    def weights(self) -> dict[str, int]:
        """The keys that were promised something, with their weights."""
        return {key: line.weight for key, line in self._of.items()}

    def within(self, share: float, waiting: Callable[[str], int]) -> float:
        """Promises to keys that would not hold more than `share` places for a unit of weight, beside those in which
        they are `waiting` already."""
        return sum(min(line.count, max(0.0, share * line.weight - waiting(key))) for key, line in self._of.items())

    def make(self, key: str, mark: int, weight: int, rate: float, pace: float | None, now: float) -> float:
        """Promise `key` the next place that is not promised to it yet; seconds to wait, whole.

        `rate` is how many places a second become free for all, `pace` how many of them `key` gets, if that is known.
        """
        self.outstanding(now)
        line = self._of.get(key)
        others = sum(other.weight for other in self._of.values() if other is not line)
        if line is None:
            line = _Line(now)
        line.weight = weight
        rate *= weight / (weight + others)
        if pace is not None:
            rate = min(rate, pace)
        due = min(max(now, line.last) + CAUTION / rate, now + LONGEST)
        seconds = max(SHORTEST, math.ceil(due - now))
        if line.count < rate * LONGEST * 2:
            line.add(mark, now + seconds)
            line.last = due
            self._of[key] = line
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
        return True


class _Line:
    """The promises of one key: when they are due, by mark and by time; `last` is when the last is, unrounded."""

    __slots__ = ("_by_mark", "_heap", "count", "last", "weight")

    def __init__(self, now: float) -> None:
        self.count = 0
        self.last = now
        self.weight = 1
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
