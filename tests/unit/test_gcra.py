"""The rate algorithm: what it admits, what it says about waiting, and that nothing leaks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.gcra import Rate, per_minute

limits = st.integers(1, 100_000)
moments = st.floats(0, 1e7, allow_nan=False)


def test_a_fresh_limit_admits_its_number_and_no_more():
    rate = Rate(60)
    tat, now = 0.0, 1000.0
    for _ in range(60):
        assert rate.wait(tat, now) == 0
        tat = rate.take(tat, now)
    assert rate.wait(tat, now) == pytest.approx(1.0)
    assert rate.remaining(tat, now) == 0
    assert rate.reset(tat, now) == pytest.approx(60.0)


def test_one_a_minute_names_the_minute():
    rate = Rate(1)
    tat = rate.take(0.0, 500.0)
    assert rate.wait(tat, 500.0) == pytest.approx(60.0)
    assert rate.wait(tat, 560.0) == 0


@given(limits, moments, st.lists(st.tuples(st.floats(0, 90), st.integers(1, 1000)), max_size=60))
def test_waiting_as_told_is_always_enough(limit, start, steps):
    """Whatever was used before, a call that waits exactly as long as it was told is admitted."""
    rate = per_minute(limit)
    tat, now = 0.0, start
    for pause, cost in steps:
        now += pause
        wait = rate.wait(tat, now, cost)
        assert rate.wait(tat, now + wait, cost) <= 1e-5 * max(1.0, rate.interval)
        now += wait
        tat = rate.take(tat, now, min(cost, limit))


@given(limits, st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), min_size=1, max_size=80))
def test_never_more_than_the_bucket_and_its_refill(limit, steps):
    rate = per_minute(limit)
    tat, now, start, used = 0.0, 1000.0, 1000.0, 0
    for pause, cost in steps:
        now += pause
        cost = min(cost, limit)
        if rate.wait(tat, now, cost) == 0:
            tat = rate.take(tat, now, cost)
            used += cost
        assert used <= limit + (now - start) / rate.interval + 1e-3
        assert 0 <= rate.remaining(tat, now) <= limit


@given(limits, st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1000), st.integers(0, 3000)), max_size=60))
def test_giving_back_never_makes_more_than_a_full_bucket(limit, steps):
    """Estimates that are trued up to less or more neither invent units nor lose them."""
    rate = per_minute(limit)
    tat, now = 0.0, 1000.0
    for pause, estimate, actual in steps:
        now += pause
        tat = rate.take(tat, now, estimate)
        tat = rate.give_back(tat, estimate - actual) if actual <= estimate else rate.take(tat, now, actual - estimate)
        assert 0 <= rate.remaining(tat, now) <= limit
        assert rate.wait(tat, now + rate.reset(tat, now) + 1e-3, limit) == 0


@given(limits, st.lists(st.integers(0, 500), max_size=40))
def test_taking_and_giving_back_at_once_changes_nothing(limit, costs):
    rate = per_minute(limit)
    tat = rate.take(0.0, 1000.0, limit)
    before = tat
    for cost in costs:
        tat = rate.take(tat, 1000.0, cost)
    for cost in costs:
        tat = rate.give_back(tat, cost)
    assert tat == pytest.approx(before, abs=1e-6)
