"""The breaker's table, and what must hold for any sequence of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.breaker import Breaker, BreakerState


def test_failures_in_a_row_open_it_and_one_probe_closes_it() -> None:
    breaker = Breaker(failures=3, seconds=5.0)

    assert [breaker.fail(0.0) for _ in range(2)] == [False, False]
    breaker.succeed()
    assert [breaker.fail(1.0) for _ in range(3)] == [False, False, True]
    assert (breaker.state(5.9), breaker.allows(5.9), breaker.seconds_left(5.0)) == (BreakerState.OPEN, False, 1.0)
    assert (breaker.state(6.0), breaker.allows(6.0)) == (BreakerState.HALF_OPEN, True)
    assert breaker.take(6.0)
    assert not breaker.allows(6.0)
    assert breaker.succeed()
    assert (breaker.state(6.0), breaker.allows(6.0)) == (BreakerState.CLOSED, True)


def test_a_failed_probe_waits_longer_up_to_a_bound() -> None:
    breaker = Breaker(failures=1, seconds=1.0)
    now = 0.0
    breaker.fail(now)
    waits = []
    for _ in range(5):
        now += breaker.seconds_left(now)
        breaker.take(now)
        breaker.fail(now)
        waits.append(breaker.seconds_left(now))

    assert waits == [2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_probe_without_a_result_leaves_room_for_another() -> None:
    breaker = Breaker(failures=1, seconds=1.0)
    breaker.fail(0.0)
    breaker.take(1.0)

    breaker.release()

    assert breaker.allows(1.0)
    assert breaker.state(1.0) is BreakerState.HALF_OPEN


def test_a_probe_that_takes_long_does_not_keep_the_others_out() -> None:
    breaker = Breaker(failures=1, seconds=2.0)
    breaker.fail(0.0)
    breaker.take(2.0)

    assert (breaker.allows(3.9), breaker.allows(4.0)) == (False, True)
    breaker.take(4.0)
    assert (breaker.allows(5.9), breaker.allows(6.0)) == (False, True)
    assert breaker.succeed()


def test_while_older_answers_go_on_failures_are_not_in_a_row() -> None:
    breaker = Breaker(failures=2, seconds=1.0)

    for _ in range(5):
        assert not breaker.fail(0.0)
        breaker.flow()
    assert not breaker.fail(0.0)
    assert breaker.fail(0.0)
    breaker.flow()
    assert breaker.state(0.5) is BreakerState.OPEN, "but they do not close it"


def test_answers_to_older_calls_do_not_close_an_open_breaker() -> None:
    breaker = Breaker(failures=1, seconds=1.0)
    breaker.fail(0.0)

    assert not breaker.succeed()
    assert not breaker.fail(0.5)
    assert breaker.state(0.9) is BreakerState.OPEN
    assert breaker.seconds_left(0.5) == 0.5


EVENTS = st.lists(
    st.tuples(st.sampled_from(["take", "succeed", "fail", "release", "recover", "flow"]), st.floats(0, 3))
)


@given(EVENTS, st.integers(1, 4))
def test_never_two_probes_and_never_open_without_failures(events: list[tuple[str, float]], failures: int) -> None:
    breaker = Breaker(failures, seconds=2.0)
    now = 0.0
    in_a_row = 0
    probes = 0
    probed_at = 0.0
    for event, passed in events:
        now += passed
        if now - probed_at >= 2.0:
            probes = 0  # it has had its time
        state = breaker.state(now)
        if event == "take":
            if not breaker.allows(now):
                continue
            probes += breaker.take(now)
            probed_at = now
            assert probes <= 1
            assert not breaker.allows(now) or state is BreakerState.CLOSED
        elif event == "fail":
            in_a_row += 1
            opened = breaker.fail(now)
            assert not (opened and state is BreakerState.CLOSED and in_a_row < failures)
            probes = 0 if opened else probes
        else:
            in_a_row = 0 if event != "release" else in_a_row
            if event == "flow":
                breaker.flow()
                continue
            probes = 0 if event in ("release", "recover") or breaker.state(now) else probes
            getattr(breaker, event)()
            probes = 0 if breaker.state(now) is BreakerState.CLOSED else probes
    breaker.recover()
    assert breaker.allows(now)
