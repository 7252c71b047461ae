"""Counters and histograms that cost an addition a call, exposed through prometheus_client.

prometheus_client's own take a lock and walk the bounds in Python for every observation: 55 µs of a call with eight of
them (docs/profile.md). These are for one thread, the event loop's, which also renders the exposition.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

MOST_NEW = 512  # sorting as many takes less than a tenth of a millisecond


class CounterChild:
    """The counter of one set of label values."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Add `amount`, which is not negative."""
        self.value += amount


class HistogramChild:
    """The histogram of one set of label values. `counts[i]` is the number of observations in bucket i alone.

    Observations are kept as they come, in `new`, and brought into buckets many at a time (`settle`).
    """

    __slots__ = ("bounds", "counts", "exemplars", "new", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.new: list[float] = []
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, tuple[str, float, float]] = {}

    def observe(self, value: float, trace_id: str | None = None) -> None:
        """Count `value`; with a trace id it becomes its bucket's exemplar."""
        self.new.append(value)
        if len(self.new) >= MOST_NEW:
            self.settle()
        if trace_id is not None:
            self.exemplars[bisect_left(self.bounds, value)] = (trace_id, value, time.time())

    def settle(self) -> None:
        """Bring what is new into its buckets."""
        new = self.new
        self.total += sum(new)
        new.sort()
        below = 0
        for index, bound in enumerate(self.bounds):
            upto = bisect_right(new, bound, below)
            self.counts[index] += upto - below
            below = upto
        self.counts[-1] += len(new) - below
        new.clear()


class Counter(Collector):  # type: ignore[misc]  # prometheus_client publishes no types
    """A family of counters. `name` without `_total`."""

    _type = "counter"

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, labels
        self._children: dict[tuple[str, ...], CounterChild] = {}
        registry.register(self)

    def labels(self, *values: str) -> CounterChild:
        """The child of these label values; keep it, looking it up costs more than counting."""
        return self._children.setdefault(tuple(map(str, values)), CounterChild())

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return [CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)]

    def collect(self) -> Iterable[Metric]:
        """The family as it is now."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labelnames)
        for values, child in self._children.items():
            family.add_metric(values, child.value)
        return [family]


class Histogram(Collector):  # type: ignore[misc]
    """A family of histograms with the upper bounds `buckets`; +Inf is added."""

    _type = "histogram"

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        registry: CollectorRegistry,
        buckets: Sequence[float],
    ) -> None:
        self._name, self._documentation, self._labelnames = name, documentation, labels
        self._bounds = tuple(float(bound) for bound in buckets)
        self._texts = (*(str(bound) for bound in self._bounds), "+Inf")
        self._children: dict[tuple[str, ...], HistogramChild] = {}
        registry.register(self)
        if not labels:
            self.labels()

    def labels(self, *values: str) -> HistogramChild:
        """The child of these label values; keep it."""
        return self._children.setdefault(tuple(map(str, values)), HistogramChild(self._bounds))

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return [HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)]

    def collect(self) -> Iterable[Metric]:
        """The family as it is now."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labelnames)
        for values, child in self._children.items():
            buckets: list[tuple[str, float, Exemplar | None]] = []
            below = 0
            child.settle()
            for index, text in enumerate(self._texts):
                below += child.counts[index]
                found = child.exemplars.get(index)
                exemplar = Exemplar({"trace_id": found[0]}, found[1], found[2]) if found else None
                buckets.append((text, below, exemplar))
            family.add_metric(values, buckets=buckets, sum_value=child.total)
        return [family]
