"""How fast the room drains: measured while calls wait, and expected before."""

from __future__ import annotations

import pytest

from gateway.drain_rate import MEMORY_SECONDS, DrainRate


def test_the_rate_is_measured_only_while_calls_wait() -> None:
    rate = DrainRate(places=8)
    now = 0.0
    rate.busy(now)
    for _ in range(100):
        now += 0.25
        rate.admitted(now)
    rate.idle(now)

    assert rate.measured(now + 1.0) == pytest.approx(4.0, rel=0.05)
    rate.busy(now + 1.0)
    for step in range(1, 9):
        rate.admitted(now + 1.0 + step * 0.25)
    assert rate.measured(now + 3.0) == pytest.approx(4.0, rel=0.05)


def test_what_was_measured_long_ago_is_forgotten() -> None:
    rate = DrainRate(places=8)
    rate.busy(0.0)
    for minute in range(4):
        rate.admitted(minute * 60.0)  # it was stuck in the night
    rate.served(seconds=1.0)
    rate.idle(180.0)

    assert rate.measured(180.0 + 5 * MEMORY_SECONDS) is None
    assert rate.calls_per_second(180.0 + 5 * MEMORY_SECONDS) == 8.0


def test_before_it_is_measured_service_times_say_what_to_expect() -> None:
    rate = DrainRate(places=8)
    assert rate.calls_per_second(0.0) == 4.0, "two seconds a call is the first guess"

    rate.served(seconds=4.0)

    assert rate.calls_per_second(0.0) == 2.0


def test_running_calls_that_are_older_than_calls_used_to_become_count() -> None:
    rate = DrainRate(places=8)
    rate.served(seconds=1.0)
    for _ in range(8):
        rate.granted(0.0)

    assert rate.calls_per_second(0.5) == 8.0
    assert rate.calls_per_second(4.0) == 2.0
    for _ in range(8):
        rate.left(0.0)
    assert rate.calls_per_second(100.0) == 8.0


def test_a_stall_is_noticed() -> None:
    rate = DrainRate(places=8)
    rate.busy(0.0)
    for step in range(40):
        rate.admitted(step * 0.1)

    before = rate.calls_per_second(4.0)

    assert before == pytest.approx(10.0, rel=0.05)
    assert rate.calls_per_second(14.0) < before / 4
