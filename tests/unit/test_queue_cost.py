"""What a call costs in the waiting room does not depend on how many others wait there: function calls, counted."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.doubles.clock import run_virtual
from tests.doubles.flow import call, capacity, used

from gateway.call import Call

KEYS = 10  # that wait; the cost grows with the logarithm of this number, not with the calls
CALLS = 200
LENGTHS = (10, 1_000, 20_000)
TOLERANCE = 1.05


class Crowd:
    """A full engine and `length` calls that wait for it."""

    def __init__(self, length: int) -> None:
        self.room = capacity(engine_concurrency=4, queue_calls=1_000_000, queue_tokens=10**12, queue_seconds=10**9)
        self._entering: dict[Call, Coroutine[Any, Any, None]] = {}
        self.running: list[Call] = []
        for number in range(4 + length):
            self.come(number)
        assert (len(self.running), self.room.room.calls) == (4, length)

    def come(self, number: int) -> None:
        """One more call: it runs, or waits."""
        made = call(f"key-{number % KEYS}")
        entering = self.room.enter(made)
        try:
            entering.send(None)
        except StopIteration:
            self.running.append(made)
        else:
            self._entering[made] = entering

    def go(self) -> None:
        """One call ends; the one that gets its place goes on."""
        done = self.running.pop(0)
        self.room.leave(used(done, 100, 100))
        granted = next(made for made in self._entering if made.backend is not None)
        with pytest.raises(StopIteration):
            self._entering.pop(granted).send(None)
        self.running.append(granted)

    def close(self) -> None:
        """End those who still wait."""
        for entering in self._entering.values():
            entering.close()
        self.room.close()


def counted(length: int) -> float:
    """Function calls inside the gateway for one call that comes, waits its turn and goes, with `length` others."""

    async def count() -> float:
        crowd = Crowd(length)
        profile = cProfile.Profile()
        for number in range(CALLS + 20):
            if number == 20:
                profile.enable()
            crowd.come(number)
            crowd.go()
        profile.disable()
        crowd.close()
        rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
        return sum(calls for place, (_, calls, *_) in rows if "test_queue_cost" not in place[0]) / CALLS

    return run_virtual(count())


def test_a_call_costs_the_same_however_many_wait() -> None:
    found = {length: counted(length) for length in LENGTHS}
    print(" ".join(f"{length:,} waiting: {each:.0f} function calls;" for length, each in found.items()))
    assert found[LENGTHS[-1]] <= found[LENGTHS[0]] * TOLERANCE, found
