"""Our counters and histograms expose what prometheus_client's own would."""

from __future__ import annotations

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics

from gateway.histograms import MOST_NEW, Counter, Histogram

BUCKETS = (0.1, 1, 2.5, 10)


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(st.lists(st.tuples(st.sampled_from(["a", 'b"\n']), st.floats(0, 20)), max_size=30))
def test_same_exposition_as_the_library(observations: list[tuple[str, float]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("h_seconds", "Help.", ("x",), ours, BUCKETS)
    counter = Counter("c", "Help.", ("x",), ours)
    wanted = prometheus_client.Histogram("h_seconds", "Help.", ("x",), buckets=BUCKETS, registry=theirs)
    wanted_counter = prometheus_client.Counter("c", "Help.", ("x",), registry=theirs)
    for label, value in observations:
        histogram.labels(label).observe(value)
        counter.labels(label).inc(value)
        wanted.labels(label).observe(value)
        wanted_counter.labels(label).inc(value)
    # Sums are added up in another order.
    assert [line for line in lines(ours) if "_sum{" not in line] == [li for li in lines(theirs) if "_sum{" not in li]
    for label in {label for label, _ in observations}:
        sums = [registry.get_sample_value("h_seconds_sum", {"x": label}) for registry in (ours, theirs)]
        assert sums[0] == pytest.approx(sums[1])


def test_many_observations_between_two_looks() -> None:
    registry = CollectorRegistry()
    child = Histogram("h_seconds", "Help.", (), registry, BUCKETS).labels()
    for number in range(2 * MOST_NEW + 5):
        child.observe(0.05 if number % 2 else 100)
    assert registry.get_sample_value("h_seconds_bucket", {"le": "0.1"}) == MOST_NEW + 2
    assert registry.get_sample_value("h_seconds_count") == 2 * MOST_NEW + 5


def test_exemplar_stands_at_its_bucket() -> None:
    registry = CollectorRegistry()
    histogram = Histogram("h_seconds", "Help.", (), registry, BUCKETS)
    histogram.labels().observe(0.5, "ab" * 16)
    found = [line for line in openmetrics(registry).decode().splitlines() if "trace_id" in line]
    assert len(found) == 1
    assert found[0].startswith('h_seconds_bucket{le="1.0"} 1.0 # {trace_id="' + "ab" * 16 + '"} 0.5 ')


def test_a_bound_belongs_to_its_bucket() -> None:
    registry = CollectorRegistry()
    Histogram("h_seconds", "Help.", (), registry, BUCKETS).labels().observe(0.1)
    assert registry.get_sample_value("h_seconds_bucket", {"le": "0.1"}) == 1
