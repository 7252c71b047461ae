"""Which engine gets a call: least loaded, but a conversation stays where its prefix is, within bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.stages.dispatch import BOUND, SLACK_TOKENS, choose


@dataclass
class Engine:
    name: str
    weight: int = 1
    outstanding: float = 0.0


ENGINES = st.lists(st.builds(Engine, st.uuids().map(str), st.integers(1, 5), st.floats(0, 1e6)), min_size=1, max_size=6)


@given(ENGINES, st.floats(1, 1e5))
def test_without_a_conversation_the_least_loaded_for_its_weight(engines: list[Engine], cost: float) -> None:
    chosen = choose(engines, None, cost)

    assert all(
        (chosen.outstanding + cost) / chosen.weight <= (other.outstanding + cost) / other.weight for other in engines
    )


@given(ENGINES, st.integers(0, 2**32 - 1), st.floats(1, 1e5))
def test_a_home_is_never_loaded_much_more_than_the_mean(engines: list[Engine], home: int, cost: float) -> None:
    chosen = choose(engines, home, cost)

    mean = (sum(engine.outstanding for engine in engines) + cost) / sum(engine.weight for engine in engines)
    least = min((engine.outstanding + cost) / engine.weight for engine in engines)
    load = (chosen.outstanding + cost) / chosen.weight
    assert load <= max(mean * BOUND + SLACK_TOKENS, least) * (1 + 1e-9)


def test_conversations_stay_and_spread_by_weight() -> None:
    engines = [Engine("a"), Engine("b"), Engine("c", weight=2)]

    homes = {conversation * 7919: choose(engines, conversation * 7919, 1.0).name for conversation in range(4000)}
    again = {conversation: choose(engines, conversation, 1.0).name for conversation in homes}
    without_b = {c: choose([engines[0], engines[2]], c, 1.0).name for c in homes}

    assert again == homes
    counts = Counter(homes.values())
    assert 800 < counts["a"] < 1200
    assert 800 < counts["b"] < 1200
    assert 1800 < counts["c"] < 2200
    assert all(without_b[c] == homes[c] for c in homes if homes[c] != "b"), "only b's conversations move"


def test_a_busy_home_lets_its_conversation_go() -> None:
    engines = [Engine("a"), Engine("b")]
    home = choose(engines, 42, 100.0)
    home.outstanding = 100_000.0

    assert choose(engines, 42, 100.0) is not home
