"""What is promised by `Retry-After`: to one caller after the other, kept once and when due."""

from __future__ import annotations

from gateway.promises import GRACE_SECONDS, LONGEST, Promises


def test_promises_are_made_one_after_the_other() -> None:
    promises = Promises()

    alike = [promises.make(f"key{n}", n, 1, rate=2.0, pace=None, now=0.0) for n in range(10)]
    more = [promises.make("key0", n, 1, rate=2.0, pace=None, now=0.0) for n in range(2)]

    assert alike == sorted(alike)
    assert alike[0] == 1.0
    assert alike[-1] == 6.0, "ten places at two a second, with a little caution, in whole seconds"
    assert more == [7.0, 12.0], "behind its own, at a tenth of the rate"
    assert promises.outstanding(0.0) == 12
    assert promises.of("key0") == 3


def test_a_key_is_promised_no_more_than_its_pace() -> None:
    promises = Promises()

    assert [promises.make("slow", n, 1, rate=20.0, pace=0.5, now=0.0) for n in range(3)] == [3.0, 5.0, 7.0]


def test_a_weight_counts() -> None:
    promises = Promises()
    promises.make("plain", 1, 1, rate=1.0, pace=None, now=0.0)

    assert promises.weights() == {"plain": 1}
    assert [promises.make("gold", n, 3, rate=1.0, pace=None, now=0.0) for n in range(2)] == [2.0, 3.0]


def test_only_promises_within_a_share_are_held_against_others() -> None:
    promises = Promises()
    for mark in range(20):
        promises.make("heavy", mark, 1, rate=1.0, pace=None, now=0.0)
    promises.make("light", 1, 1, rate=1.0, pace=None, now=0.0)

    assert promises.within(4.0, lambda key: 0) == 5, "four and one"
    assert promises.within(4.0, lambda key: 3) == 2, "one and one"
    assert promises.within(4.0, lambda key: 9) == 0


def test_a_promise_is_kept_once_and_only_when_due() -> None:
    promises = Promises()
    wait = promises.make("a", 7, 1, rate=0.5, pace=None, now=0.0)

    assert not promises.keep("a", 7, wait - 1.0)
    assert not promises.keep("b", 7, wait)
    assert not promises.keep("a", 8, wait), "another request of the same key"
    assert promises.keep("a", 7, wait)
    assert not promises.keep("a", 7, wait)
    assert promises.outstanding(wait) == 0


def test_who_does_not_come_back_loses_it() -> None:
    promises = Promises()
    wait = promises.make("a", 7, 1, rate=1.0, pace=None, now=0.0)

    assert promises.outstanding(wait + GRACE_SECONDS) == 1
    assert promises.outstanding(wait + GRACE_SECONDS + 0.1) == 0


def test_a_key_that_hammers_pushes_only_its_own_future_away() -> None:
    promises = Promises()
    waits = [promises.make("hammer", 7, 1, rate=10.0, pace=None, now=0.0) for _ in range(100_000)]

    assert waits[-1] == LONGEST
    assert promises.outstanding(0.0) <= 10 * LONGEST * 2, "and its memory is bounded"
    assert promises.make("other", 7, 1, rate=10.0, pace=None, now=0.0) == 1.0
    assert promises.make("slow", 7, 1, rate=0.001, pace=None, now=0.0) == LONGEST
