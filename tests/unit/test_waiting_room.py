"""Classes, ageing, bounds, pushing out, and the longest wait."""

from __future__ import annotations

import pytest

from gateway.fair_queue import Ticket
from gateway.waiting_room import WaitingRoom

POOL = ("engine",)


def room(calls: int = 100, tokens: float = 1e6, seconds: float = 30.0) -> WaitingRoom:
    return WaitingRoom(calls, tokens, seconds)


def ticket(key: str = "a", rank: int = 1, cost: float = 10.0, weight: int = 1) -> Ticket:
    return Ticket(key, cost, weight, rank, POOL)


def drain(waiting: WaitingRoom) -> list[str]:
    order = []
    while served := waiting.next(lambda _: True, 0.0):
        order.append(served.key)
    return order


def test_a_better_class_goes_first() -> None:
    waiting = room()
    for key, rank in (("low", 2), ("normal", 1), ("high", 0), ("low", 2), ("high", 0)):
        waiting.add(ticket(key, rank), 0.0)

    assert drain(waiting) == ["high", "high", "normal", "low", "low"]


def test_nothing_starves_under_a_stream_of_better_calls() -> None:
    waiting = room()
    order = []
    for _ in range(64):
        waiting.add(ticket("chat", 0), 0.0)
        waiting.add(ticket("chat", 0), 0.0)
        waiting.add(ticket("batch", 2), 0.0)
        order.append(waiting.next(lambda _: True, 0.0).key)

    assert order.count("batch") == 4, "one token in sixteen"
    assert order.index("batch") == 15


def test_who_waits_longest_of_a_class_does_not_overtake_its_fair_share() -> None:
    waiting = room()
    for _ in range(50):
        waiting.add(ticket("early", 1), 0.0)
    for _ in range(10):
        waiting.next(lambda _: True, 0.0)
    for _ in range(20):
        waiting.add(ticket("late", 1), 25.0)

    order = [waiting.next(lambda _: True, 0.0).key for _ in range(20)]

    assert 9 <= order.count("late") <= 11


def test_late_calls_leave_in_order_and_nobody_else() -> None:
    waiting = room(seconds=10.0)
    tickets = [ticket(str(n), rank=n % 3) for n in range(6)]
    for n, one in enumerate(tickets):
        waiting.add(one, float(n))

    assert waiting.next_deadline() == 10.0
    assert [late.key for late in waiting.late(12.5)] == ["0", "1", "2"]
    assert waiting.next_deadline() == 13.0
    assert sorted(drain(waiting)) == ["3", "4", "5"]
    assert waiting.next_deadline() is None
    assert (waiting.calls, waiting.tokens) == (0, 0.0)


def test_the_room_is_bounded_by_calls_and_tokens_but_one_large_call_fits() -> None:
    waiting = room(calls=3, tokens=100.0)
    assert not waiting.full(500.0)
    waiting.add(ticket(cost=60.0), 0.0)
    assert waiting.full(50.0)
    assert not waiting.full(40.0)
    waiting.add(ticket(cost=1.0), 0.0)
    waiting.add(ticket(cost=1.0), 0.0)
    assert waiting.full(1.0)


def victim(waiting: WaitingRoom, newcomer: Ticket, calls: int) -> Ticket | None:
    """Who gives way to a newcomer in a room of `calls` places."""
    mine = (waiting.waiting_of(newcomer.key, newcomer.rank) + 1) / newcomer.weight
    return waiting.victim(newcomer, mine, waiting.share(newcomer, calls, {}))


def test_a_newcomer_pushes_out_the_newest_call_of_a_key_far_above_its_share() -> None:
    waiting = room()
    hog = [ticket("hog") for _ in range(9)]
    for one in hog:
        waiting.add(one, 0.0)
    waiting.add(ticket("other"), 0.0)

    assert victim(waiting, ticket("light"), calls=10) is hog[-1], "three keys: a share is 3.3"
    assert victim(waiting, ticket("hog"), calls=10) is None, "nobody gains a place by sending more"
    assert victim(waiting, ticket("other"), calls=10) is hog[-1], "its second call is within its share"
    for one in hog[3:]:
        waiting.remove(one, 0.0)
    assert victim(waiting, ticket("light"), calls=4) is hog[2], (
        "two keys above their share are no reason to refuse a third"
    )
    assert victim(waiting, ticket("other"), calls=4) is None, "three are not far above two"


def test_several_large_keys_do_not_shut_out_a_small_one() -> None:
    waiting = room()
    for number in range(12):
        waiting.add(ticket(f"large{number % 3}"), 0.0)

    assert victim(waiting, ticket("light"), calls=12) is not None
    assert victim(waiting, ticket("large0"), calls=12) is None


def test_who_was_promised_places_counts_when_shares_are_made() -> None:
    waiting = room()
    waiting.add(ticket("gold", weight=2), 0.0)

    assert waiting.share(ticket("plain"), 12, {}) == 4.0
    assert waiting.share(ticket("plain"), 12, {"gold": 2, "away": 3}) == 2.0
    assert waiting.share(ticket("plain"), 1, {"gold": 2, "away": 3}) == 1.0, "one at least"


def test_the_pace_of_a_key_is_its_own() -> None:
    waiting = room()
    for number in range(40):
        waiting.add(ticket("quick" if number % 4 else "slow"), 0.0)
    for second in range(1, 11):
        for _ in range(2):
            waiting.next(lambda _: True, float(second))
    shares = {key: waiting.of(ticket(key), 10.0) for key in ("quick", "slow", "stranger")}

    assert shares["stranger"] == (0, None)
    assert shares["quick"] == (20, pytest.approx(1.0, rel=0.1))
    assert shares["slow"] == (0, pytest.approx(1.0, rel=0.1))


def test_a_worse_class_is_pushed_out_first_and_a_better_one_never() -> None:
    waiting = room()
    waiting.add(ticket("chat", 0), 0.0)
    waiting.add(ticket("chat", 0), 0.0)
    batch = ticket("batch", 2)
    waiting.add(batch, 0.0)

    assert victim(waiting, ticket("new", 1), calls=3) is batch
    assert victim(waiting, ticket("batch", 0), calls=3) is None
    waiting.remove(batch, 0.0)
    assert victim(waiting, ticket("new", 1), calls=2) is None


def test_a_weight_counts_when_places_are_compared() -> None:
    waiting = room()
    for _ in range(8):
        waiting.add(ticket("gold", weight=4), 0.0)

    assert victim(waiting, ticket("plain", weight=1), calls=8) is None
