"""The watchdog's decisions, under a clock of our own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.watchdog import Reading, Verdict, Watchdog

TICK = 1.0


def watchdog(**changes: float) -> Watchdog:
    facts = {"hang": 10.0, "most": 300.0, "canary": 5.0, "prefill_rate": 1000.0, "longest_tokens": 32768} | changes
    return Watchdog(0.0, **facts)  # type: ignore[arg-type]


class Bench:
    """Runs the supervisor's loop over a described engine, second by second."""

    def __init__(self, dog: Watchdog) -> None:
        self.dog, self.now = dog, 0.0
        self.verdicts: list[Verdict] = []
        self._canary: float | None = None  # when the one on its way was sent

    def run(
        self,
        seconds: float,
        *,
        calls: int = 0,
        silent: int = 0,
        moving: bool = False,
        canary: float | None,
        answers: bool = True,
    ) -> Verdict:
        """`canary`: seconds until one comes back, None: never. `moving`: a counter moves each second."""
        for _ in range(int(seconds / TICK)):
            self.now += TICK
            self.dog.tick(self.now, TICK)
            if self._canary is not None and canary is not None and self.now - self._canary >= canary:
                self.dog.canary_back(self.now)
                self._canary = None
            counters = (self.now if moving else 0.0,)
            self.dog.look(self.now, Reading(calls, silent, counters) if answers else None)
            if self._canary is None and self.dog.wants_canary(self.now):
                self.dog.canary_sent(self.now)
                self._canary = self.now
            self.verdicts.append(self.dog.verdict(self.now))
        return self.verdicts[-1]

    def seconds_until(self, verdict: Verdict) -> int:
        return self.verdicts.index(verdict) + 1


def test_idle_for_an_hour_is_healthy() -> None:
    bench = Bench(watchdog())
    bench.run(3600, canary=0.0)
    assert set(bench.verdicts) == {Verdict.HEALTHY}


def test_a_stopped_engine_is_hung_within_twenty_seconds_under_load() -> None:
    bench = Bench(watchdog())
    bench.run(60, calls=8, moving=True, canary=0.0)
    bench.verdicts.clear()
    bench.run(30, calls=8, silent=2000, canary=None)
    assert bench.seconds_until(Verdict.HUNG) < 20
    assert bench.seconds_until(Verdict.LATE) < bench.seconds_until(Verdict.HUNG)


def test_a_stopped_idle_engine_is_hung_within_twenty_seconds() -> None:
    bench = Bench(watchdog())
    bench.run(60, canary=0.0)
    bench.verdicts.clear()
    bench.run(30, canary=None)
    assert bench.seconds_until(Verdict.HUNG) < 20


def test_an_api_server_that_does_not_answer_is_hung_within_twenty_seconds() -> None:
    bench = Bench(watchdog())
    bench.run(60, canary=0.0)
    bench.verdicts.clear()
    bench.run(30, canary=None, answers=False)
    assert bench.seconds_until(Verdict.HUNG) < 20


def test_a_prefill_ten_times_as_long_as_usual_is_no_hang() -> None:
    """24,000 bytes are at most 8,000 tokens, usually 8 s here: eighty are borne, and then it goes on."""
    bench = Bench(watchdog())
    bench.run(20, canary=0.0)
    bench.run(80, calls=1, silent=24_000, canary=None)
    bench.run(5, calls=1, moving=True, canary=0.0)
    assert Verdict.HUNG not in bench.verdicts
    assert bench.verdicts[-1] is Verdict.HEALTHY


def test_behind_a_long_prefill_a_hang_is_still_found() -> None:
    bench = Bench(watchdog())
    bench.run(20, canary=0.0)
    assert bench.run(200, calls=1, silent=24_000, canary=None) is Verdict.HUNG


def test_a_slow_reader_is_no_hang() -> None:
    """Its call stays inside and no counter moves, but the engine answers canaries."""
    bench = Bench(watchdog())
    bench.run(600, calls=1, canary=0.0)
    assert set(bench.verdicts) == {Verdict.HEALTHY}


def test_a_slow_canary_is_told_before_it_is_a_hang() -> None:
    bench = Bench(watchdog())
    bench.run(60, canary=7.0)
    assert Verdict.LATE in bench.verdicts
    assert Verdict.HUNG not in bench.verdicts


def test_time_in_which_the_supervisor_itself_stood_still_does_not_count() -> None:
    bench = Bench(watchdog())
    bench.run(20, canary=None)
    suspicion = bench.dog.suspicion(bench.now)
    bench.now += 3600
    bench.dog.tick(bench.now, TICK)
    assert bench.dog.suspicion(bench.now) <= suspicion + TICK


def test_a_model_without_canary_hangs_only_with_calls_inside() -> None:
    dog = watchdog()
    dog.canary_works = False
    bench = Bench(dog)
    bench.run(3600, canary=None)
    assert set(bench.verdicts) == {Verdict.HEALTHY}
    assert bench.run(20, calls=1, canary=None) is Verdict.HUNG


def test_the_bound_has_an_end() -> None:
    dog = watchdog(prefill_rate=0.0, most=120.0)
    dog.look(1.0, Reading(1, 10_000_000, (0.0,)))
    assert dog.bound() == 120.0


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**6), st.booleans(), st.booleans()), max_size=200),
    st.floats(0.1, 9.0),
)
def test_an_engine_that_answers_canaries_in_time_never_hangs(
    story: list[tuple[int, int, bool, bool]], answer_seconds: float
) -> None:
    """Whatever the calls do, whatever the readings say."""
    bench = Bench(watchdog())
    for calls, silent, moving, answers in story:
        bench.run(3, calls=calls, silent=silent, moving=moving, canary=answer_seconds, answers=answers)
    assert Verdict.HUNG not in bench.verdicts


@given(st.integers(0, 64), st.integers(0, 10**7), st.floats(1.0, 10_000.0))
def test_an_engine_where_nothing_moves_always_hangs(calls: int, silent: int, rate: float) -> None:
    bench = Bench(watchdog(prefill_rate=rate))
    assert bench.run(330, calls=calls, silent=silent, canary=None) is Verdict.HUNG
