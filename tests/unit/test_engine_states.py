"""The table of states, the phases of a start, and when the next start comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.restarts import LONGEST_WAIT_SECONDS, Restarts
from engine.states import FOLLOWS, Life, Phase, State


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_only_the_tables_steps_are_possible(before: State, after: State) -> None:
    life = Life(Clock())
    life.state = before
    if after is before:
        assert life.move(after) is False
    elif after in FOLLOWS[before]:
        assert life.move(after, "why") is True
        assert (life.state, life.reason) == (after, "why")
    else:
        with pytest.raises(ValueError, match="never followed"):
            life.move(after)


def test_every_state_can_be_stopped_and_none_is_a_trap() -> None:
    for state, following in FOLLOWS.items():
        assert state is State.STOPPING or State.STOPPING in following


def test_the_phases_of_a_start_are_timed() -> None:
    clock = Clock()
    life = Life(clock)
    for phase, seconds in zip(Phase, (1.0, 20.0, 30.0, 2.0), strict=True):
        assert life.enter(phase)
        clock.now += seconds
    assert life.enter(Phase.WEIGHTS) is False  # they only go forward
    life.move(State.READY)
    assert life.phase is None
    assert list(life.phase_seconds.values()) == [1.0, 20.0, 30.0, 2.0]
    life.restart()
    assert life.phase_seconds == {}


def test_waits_double_and_have_an_end() -> None:
    restarts = Restarts(budget=10, window=1e6)
    waits = [restarts.after(float(i), True, True, "crash").wait for i in range(8)]
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_budget_comes_back_as_restarts_leave_the_window() -> None:
    restarts = Restarts(budget=2, window=100)
    assert not restarts.after(0, True, True, "a").failed
    assert not restarts.after(10, True, True, "a").failed
    turn = restarts.after(20, True, True, "a")
    assert (turn.failed, turn.wait) == (True, 80)  # the first one leaves the window at 100
    assert not restarts.after(500, True, True, "a").failed


def test_no_restarts_at_all() -> None:
    assert Restarts(budget=0, window=100).after(0, True, True, "a").wait is None


def test_what_cannot_start_is_failed_for_good() -> None:
    restarts = Restarts(budget=5, window=100)
    turn = restarts.after(0, False, False, "unknown argument")
    assert (turn.failed, turn.wait) == (True, None)


def test_the_same_reason_twice_is_failed_for_good_another_one_is_tried() -> None:
    restarts = Restarts(budget=5, window=100)
    assert not restarts.after(0, False, True, "one").failed
    assert not restarts.after(1, False, True, "other").failed
    assert restarts.after(2, False, True, "other").failed
    restarts.forget()
    assert not restarts.after(3, False, True, "other").failed


@given(st.lists(st.floats(0, 1000), max_size=50), st.integers(1, 6), st.floats(1, 500))
def test_never_more_starts_in_a_window_than_the_budget(gaps: list[float], budget: int, window: float) -> None:
    """Starts happen when the wait is over; no window of that length sees more than the budget and one."""
    restarts, now, starts = Restarts(budget, window), 0.0, []
    for gap in gaps:
        now += gap
        turn = restarts.after(now, True, True, "crash")
        assert turn.wait is not None
        assert 0 <= turn.wait <= max(window, LONGEST_WAIT_SECONDS) + 1e-6
        now += turn.wait
        starts.append(now)
    for first in starts:
        assert sum(first <= start < first + window * 0.999 for start in starts) <= budget + 1
