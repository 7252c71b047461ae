"""How long to wait: measured while calls wait, expected before, and promised to one caller after the other."""

from __future__ import annotations

import pytest

from gateway.drain_rate import GRACE_SECONDS, LONGEST, DrainRate, Promises


def test_the_rate_is_measured_only_while_calls_wait() -> None:
    rate = DrainRate(places=8)
    now = 0.0
    rate.busy(now)
    for _ in range(100):
        now += 0.25
        rate.admitted(50.0, now)
    rate.idle()

    assert rate.measured
    assert rate.calls_per_second(now + 1000.0) == pytest.approx(4.0, rel=0.05)
    assert rate.tokens_per_second(now + 1000.0) == pytest.approx(200.0, rel=0.05)


def test_before_it_is_measured_service_times_say_what_to_expect() -> None:
    rate = DrainRate(places=8)
    assert rate.calls_per_second(0.0) == 4.0, "two seconds a call is the first guess"

    rate.served(seconds=4.0, tokens=100.0)

    assert rate.calls_per_second(0.0) == 2.0
    assert rate.tokens_per_second(0.0) == 200.0


def test_running_calls_that_are_older_than_calls_used_to_become_count() -> None:
    rate = DrainRate(places=8)
    rate.served(seconds=1.0, tokens=10.0)
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
        rate.admitted(1.0, step * 0.1)

    before = rate.calls_per_second(4.0)

    assert before == pytest.approx(10.0, rel=0.05)
    assert rate.calls_per_second(14.0) < before / 4


def test_promises_are_made_one_after_the_other() -> None:
    promises = Promises()

    waits = [promises.make(f"key{n}", n, rate=2.0, now=0.0) for n in range(10)]

    assert waits == sorted(waits)
    assert waits[0] == 1.0
    assert waits[-1] == 6.0, "ten places at two a second, with a little caution, in whole seconds"
    assert promises.outstanding(0.0) == 10


def test_a_promise_is_kept_once_and_only_when_due() -> None:
    promises = Promises()
    wait = promises.make("a", 7, rate=0.5, now=0.0)

    assert not promises.keep("a", 7, wait - 1.0)
    assert not promises.keep("b", 7, wait)
    assert not promises.keep("a", 8, wait), "another request of the same key"
    assert promises.keep("a", 7, wait)
    assert not promises.keep("a", 7, wait)
    assert promises.outstanding(wait) == 0


def test_who_does_not_come_back_loses_it() -> None:
    promises = Promises()
    wait = promises.make("a", 7, rate=1.0, now=0.0)

    assert promises.outstanding(wait + GRACE_SECONDS) == 1
    assert promises.outstanding(wait + GRACE_SECONDS + 0.1) == 0


def test_a_key_that_hammers_pushes_only_its_own_future_away() -> None:
    promises = Promises()
    waits = [promises.make("hammer", 7, rate=10.0, now=0.0) for _ in range(100_000)]

    assert waits[-1] == LONGEST
    assert promises.outstanding(0.0) <= 10 * LONGEST * 2, "and its memory is bounded"
    assert promises.make("other", 7, rate=10.0, now=0.0) == 1.0
    assert promises.make("slow", 7, rate=0.001, now=0.0) == LONGEST
