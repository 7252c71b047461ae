"""Classes, ageing, bounds, pushing out, and the longest wait."""

from __future__ import annotations

from gateway.fair_queue import Ticket
from gateway.waiting_room import WaitingRoom

POOL = ("engine",)


def room(calls: int = 100, tokens: float = 1e6, seconds: float = 30.0) -> WaitingRoom:
    return WaitingRoom(calls, tokens, seconds)


def ticket(key: str = "a", rank: int = 1, cost: float = 10.0, weight: int = 1) -> Ticket:
    return Ticket(key, cost, weight, rank, POOL)


def drain(waiting: WaitingRoom, now: float) -> list[str]:
    order = []
    while served := waiting.next(lambda _: True, now):
        order.append(served.key)
    return order


def test_a_better_class_goes_first() -> None:
    waiting = room()
    for key, rank in (("low", 2), ("normal", 1), ("high", 0), ("low", 2), ("high", 0)):
        waiting.add(ticket(key, rank), 0.0)

    assert drain(waiting, 1.0) == ["high", "high", "normal", "low", "low"]


def test_nothing_starves_under_a_stream_of_better_calls() -> None:
    waiting = room(seconds=30.0)
    waiting.add(ticket("batch", 2), 0.0)
    now, served = 0.0, ""
    while served != "batch":
        now += 0.5
        waiting.add(ticket("chat", 0), now)
        waiting.add(ticket("chat", 0), now)
        served = waiting.next(lambda _: True, now).key
        assert now < 15.0, "after two promotions it shares fairly with the first class"

    assert now >= 10.0, "but not before"


def test_ageing_brings_no_credit_against_the_better_class() -> None:
    waiting = room(calls=1000, seconds=30.0)
    for _ in range(100):
        waiting.add(ticket("batch", 1), 0.0)
    for _ in range(300):
        waiting.add(ticket("chat", 0), 0.0)
    assert [waiting.next(lambda _: True, 1.0).key for _ in range(100)] == ["chat"] * 100

    later = [waiting.next(lambda _: True, 6.0).key for _ in range(100)]

    assert 49 <= later.count("batch") <= 51


def test_late_calls_leave_in_order_and_nobody_else() -> None:
    waiting = room(seconds=10.0)
    tickets = [ticket(str(n), rank=n % 3) for n in range(6)]
    for n, one in enumerate(tickets):
        waiting.add(one, float(n))

    assert waiting.next_deadline() == 10.0
    assert [late.key for late in waiting.late(12.5)] == ["0", "1", "2"]
    assert waiting.next_deadline() == 13.0
    assert sorted(drain(waiting, 12.5)) == ["3", "4", "5"]
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


def test_a_newcomer_pushes_out_the_newest_call_of_the_key_with_most() -> None:
    waiting = room()
    hog = [ticket("hog") for _ in range(3)]
    for one in hog:
        waiting.add(one, 0.0)
    waiting.add(ticket("other"), 0.0)

    assert waiting.victim(ticket("light")) is hog[-1]
    assert waiting.victim(ticket("hog")) is None, "nobody gains a place by sending more"
    assert waiting.victim(ticket("other")) is hog[-1]
    waiting.remove(hog[-1])
    assert waiting.victim(ticket("other")) is None, "two each now"
    assert waiting.victim(ticket("light", weight=1)) is hog[1]


def test_a_worse_class_is_pushed_out_first_and_a_better_one_never() -> None:
    waiting = room()
    waiting.add(ticket("chat", 0), 0.0)
    waiting.add(ticket("chat", 0), 0.0)
    batch = ticket("batch", 2)
    waiting.add(batch, 0.0)

    assert waiting.victim(ticket("new", 1)) is batch
    assert waiting.victim(ticket("batch", 0)) is not batch
    waiting.remove(batch)
    assert waiting.victim(ticket("new", 1)) is None


def test_a_weight_counts_when_places_are_compared() -> None:
    waiting = room()
    for _ in range(3):
        waiting.add(ticket("gold", weight=4), 0.0)

    assert waiting.victim(ticket("plain", weight=1)) is None
