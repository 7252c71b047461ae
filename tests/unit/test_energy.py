"""Energy by key: shares and idle are the counter's growth, whatever happens."""

import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.energy import Meter


def call(name: str, key: str, tokens: int) -> Any:
    return SimpleNamespace(
        request_id=name,
        stage="forward",
        caller=SimpleNamespace(key_id=key),
        backend=object(),
        usage=SimpleNamespace(total=tokens),
    )


class Bench:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.keys: dict[str, float] = {}
        self.uses = {"idle": 0.0, "calls": 0.0, "unknown": 0.0}
        self.now = 1000.0

        async def read() -> bytes:
            return b""

        self.meter = Meter(read, lambda: self.calls, self.record, self.count)

    def share(self, gpus: dict[str, float], after: float = 5.0) -> None:
        """The next sample, so many seconds after the last one."""
        self.now += after
        self.meter.take(gpus, self.now)

    def record(self, shares: dict[str, float]) -> None:
        for key, joules in shares.items():
            self.keys[key] = self.keys.get(key, 0.0) + joules

    def count(self, use: str, joules: float) -> None:
        self.uses[use] += joules


def test_joules_follow_the_tokens_that_moved():
    bench = Bench()
    bench.calls = [call("1", "a", 10), call("2", "b", 0)]
    bench.share({"GPU-0": 1000.0})

    bench.calls = [call("1", "a", 40), call("2", "b", 10)]
    bench.share({"GPU-0": 1400.0})

    assert bench.keys == {"a": pytest.approx(300.0), "b": pytest.approx(100.0)}


def test_without_calls_it_is_idle_and_with_silent_ones_it_is_shared_evenly():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    bench.share({"GPU-0": 50.0})
    bench.calls = [call("1", "a", 0), call("2", "b", 0)]
    bench.share({"GPU-0": 150.0})

    assert bench.uses == {"idle": 50.0, "calls": 100.0, "unknown": 0.0}
    assert bench.keys == {"a": 50.0, "b": 50.0}


def test_a_call_that_ended_between_two_readings_pays_too():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    bench.meter.note(call("1", "a", 30))
    bench.share({"GPU-0": 60.0})

    assert bench.keys == {"a": 60.0}


def test_calls_that_ended_weigh_as_those_that_run():
    bench = Bench()
    bench.calls = [call("1", "a", 10), call("2", "a", 0), call("3", "b", 50)]
    bench.share({"GPU-0": 0.0})
    bench.meter.note(call("1", "a", 30))
    bench.meter.note(call("2", "a", 10))
    bench.meter.note(call("4", "c", 0))
    bench.calls = [call("3", "b", 70)]
    bench.share({"GPU-0": 100.0})

    assert bench.keys == {"a": pytest.approx(60.0), "b": pytest.approx(40.0)}


def test_calls_that_ended_without_a_token_share_by_their_number():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    for name, key in (("1", "a"), ("2", "a"), ("3", "b")):
        bench.meter.note(call(name, key, 0))
    bench.share({"GPU-0": 90.0})

    assert bench.keys == {"a": pytest.approx(60.0), "b": pytest.approx(30.0)}


def test_a_gap_of_hours_is_charged_to_nobody():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    bench.meter.note(call("1", "a", 30))
    bench.calls = [call("2", "b", 10)]
    bench.share({"GPU-0": 4_000_000.0}, after=8 * 3600)
    assert bench.keys == {}
    assert bench.uses == {"idle": 0.0, "calls": 0.0, "unknown": 4_000_000.0}

    bench.calls = [call("2", "b", 40)]
    bench.share({"GPU-0": 4_000_500.0})
    assert bench.keys == {"b": 500.0}  # and what follows is, to whoever runs then


def test_a_gap_of_a_few_samples_is_still_charged():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    bench.meter.note(call("1", "a", 30))
    bench.share({"GPU-0": 600.0}, after=30)

    assert bench.keys == {"a": 600.0}


def test_a_gpu_that_could_not_be_read_for_long_is_charged_to_nobody_and_the_others_are():
    bench = Bench()
    bench.share({"GPU-0": 0.0, "GPU-1": 0.0})
    for number in range(1, 100):
        bench.share({"GPU-0": 100.0 * number})
    bench.meter.note(call("1", "a", 30))
    bench.share({"GPU-0": 10_000.0, "GPU-1": 7000.0})

    assert bench.keys == {"a": 100.0}
    assert bench.uses == {"idle": 9900.0, "calls": 100.0, "unknown": 7000.0}


def test_a_clock_that_was_set_back_tells_no_interval():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    bench.calls = [call("1", "a", 30)]
    bench.share({"GPU-0": 50.0}, after=-600)

    assert bench.uses == {"idle": 0.0, "calls": 0.0, "unknown": 50.0}


def test_an_exporter_that_is_away_takes_no_memory_for_each_call():
    bench = Bench()
    bench.share({"GPU-0": 0.0})
    tracemalloc.start()
    try:
        for number in range(20_000):
            bench.meter.note(call(str(number), "abc"[number % 3], 30))
        assert tracemalloc.get_traced_memory()[0] < 20_000
    finally:
        tracemalloc.stop()


def test_a_counter_that_begins_anew_and_a_gpu_that_appears():
    bench = Bench()
    bench.share({"GPU-0": 1000.0})
    bench.share({"GPU-0": 40.0, "GPU-1": 5000.0})
    bench.share({"GPU-1": 5010.0})

    assert bench.uses["idle"] == 50.0


def test_the_same_sample_read_again_forgets_no_tokens():
    bench = Bench()
    bench.meter.take({"GPU-0": 0.0}, 1.0)
    bench.calls = [call("1", "a", 30)]
    bench.meter.take({"GPU-0": 0.0}, 1.0)
    bench.calls = [call("1", "a", 30), call("2", "b", 10)]
    bench.meter.take({"GPU-0": 40.0}, 6.0)

    assert bench.keys == {"a": 30.0, "b": 10.0}


@given(
    st.lists(
        st.tuples(
            st.integers(0, 50),
            st.integers(1, 120),
            st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100)), max_size=4),
        ),
        max_size=20,
    )
)
def test_shares_and_idle_are_the_counters_growth(steps: list[tuple[int, int, list[tuple[str, int]]]]):
    bench = Bench()
    total = 100.0
    bench.share({"GPU-0": total / 2, "GPU-1": total / 2})
    for joules, seconds, running in steps:
        total += joules
        bench.calls = [call(str(i), key, tokens) for i, (key, tokens) in enumerate(running)]
        bench.share({"GPU-0": total / 2, "GPU-1": total / 2}, seconds)

    assert sum(bench.uses.values()) == pytest.approx(total - 100.0)
    assert sum(bench.keys.values()) == pytest.approx(bench.uses["calls"])
