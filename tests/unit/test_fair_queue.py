"""The order in which keys are served: fair in tokens, whatever calls cost and whenever they end."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given
from hypothesis import strategies as st

from gateway.fair_queue import FairQueue, Ticket

POOL = ("engine",)


def ticket(number: int, key: str, cost: float, weight: int = 1, pool: tuple[str, ...] = POOL) -> Ticket:
    made = Ticket(key, cost, weight, 0, pool)
    made.number = number
    return made


def serve(queue: FairQueue, pool: tuple[str, ...] = POOL) -> Ticket | None:
    found = queue.peek(pool)
    if found is None:
        return None
    queue.take(found[1])
    return found[1]


def test_keys_take_turns_by_tokens_and_calls_of_one_key_keep_their_order() -> None:
    queue = FairQueue()
    for number in range(6):
        queue.add(ticket(number, "heavy", 100))
    for number in range(6, 12):
        queue.add(ticket(number, "light", 50))

    order = [served.number for served in iter(lambda: serve(queue), None)]

    assert [n for n in order if n < 6] == list(range(6))
    assert [n for n in order if n >= 6] == list(range(6, 12))
    first = order[:9]
    assert sum(n < 6 for n in first) == 3, "heavy gets half the tokens: three of its calls for six light ones"


def test_weights_share_in_proportion() -> None:
    queue = FairQueue()
    for number in range(400):
        queue.add(ticket(number, "gold" if number % 2 else "plain", 10, weight=3 if number % 2 else 1))

    served = Counter(found.key for _ in range(100) if (found := serve(queue)))

    assert abs(served["gold"] - 75) <= 1


def test_idleness_earns_no_credit() -> None:
    queue = FairQueue()
    queue.add(ticket(0, "sleeper", 10))
    serve(queue)
    for number in range(1, 101):
        queue.add(ticket(number, "busy", 10))
    for _ in range(50):
        serve(queue)
    for number in range(101, 131):
        queue.add(ticket(number, "sleeper", 10))

    next_ten = Counter(found.key for _ in range(10) if (found := serve(queue)))

    assert next_ten["sleeper"] in (5, 6)


def test_the_truth_is_booked_at_the_end() -> None:
    queue = FairQueue()
    for number in range(20):
        queue.add(ticket(number, "liar" if number % 2 else "honest", 10))
    first = {found.key: found for _ in range(2) if (found := serve(queue))}

    queue.settle(first["liar"], 60.0)  # five calls more than it said
    queue.settle(first["honest"], 10.0)

    order = [found.key for _ in range(6) if (found := serve(queue))]
    assert order == ["honest"] * 5 + ["liar"]


def test_a_pool_without_a_place_does_not_hold_up_another() -> None:
    queue = FairQueue()
    queue.add(ticket(0, "a", 10, pool=("busy",)))
    queue.add(ticket(1, "a", 10, pool=("free",)))

    assert serve(queue, ("free",)).number == 1
    assert serve(queue, ("free",)) is None
    assert serve(queue, ("busy",)).number == 0


KEYS = "abcd"
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "serve", "serve", "remove", "settle", "charge"]),
        st.sampled_from(KEYS),
        st.integers(1, 500),
        st.sampled_from([POOL, ("other",)]),
    ),
    max_size=120,
)


@given(OPERATIONS)
def test_nothing_is_lost_or_served_twice(operations: list[tuple[str, str, int, tuple[str, ...]]]) -> None:
    queue = FairQueue()
    waiting: dict[int, Ticket] = {}
    running: dict[int, Ticket] = {}
    for number, (what, key, cost, pool) in enumerate(operations):
        made = ticket(number, key, cost, pool=pool)
        if what == "add":
            queue.add(made)
            waiting[number] = made
        elif what == "charge":
            queue.charge(made)
            running[number] = made
        elif what == "serve" and (served := serve(queue, pool)):
            assert waiting.pop(served.number) is served
            assert served.pool == pool
            earlier = [t for t in waiting.values() if t.key == served.key and t.pool == pool]
            assert all(t.number > served.number for t in earlier), "first come, first served within a key"
            running[served.number] = served
        elif what == "remove" and waiting:
            queue.remove(waiting.pop(min(waiting, key=lambda n: (n + cost) % 7)))
        elif what == "settle" and running:
            queue.settle(running.pop(min(running)), float(cost))
        assert queue.calls == len(waiting)
        assert abs(queue.tokens - sum(t.cost for t in waiting.values())) < 1e-6
    for left in list(waiting.values()):
        assert serve(queue, left.pool) is not None
    for served in [*running.values(), *waiting.values()]:
        queue.settle(served, 0.0)
    assert all(not a.calls and not a.running and not a.lines for a in queue.accounts.values())


@given(
    st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 400)), min_size=40, max_size=200),
    st.dictionaries(st.sampled_from(KEYS), st.integers(1, 4), max_size=4),
)
def test_keys_that_wait_never_differ_by_more_than_one_call_each(
    calls: list[tuple[str, int]], weights: dict[str, int]
) -> None:
    queue = FairQueue()
    left: Counter[str] = Counter()
    for number, (key, cost) in enumerate(calls):
        queue.add(ticket(number, key, cost, weight=weights.get(key, 1)))
        left[key] += 1
    largest = max(cost for _, cost in calls)
    served: defaultdict[str, float] = defaultdict(float)
    while found := serve(queue):
        served[found.key] += found.cost / found.weight
        left[found.key] -= 1
        backlogged = [served[key] for key in left if left[key] > 0]
        if backlogged:
            assert max(backlogged) - min(backlogged) <= 2 * largest


def test_the_heap_stays_small_however_often_accounts_move() -> None:
    queue = FairQueue()
    for number in range(10):
        queue.add(ticket(number, "a", 10))
    for number in range(10, 5000):
        extra = ticket(number, "a", 10)
        queue.charge(extra)
        queue.settle(extra, 3.0)

    assert sum(len(heap) for heap in queue._heaps.values()) <= 128


def test_the_heap_stays_small_however_often_calls_of_a_key_that_runs_are_given_up() -> None:
    """Its account stands above the virtual time, so nothing about it changes while its calls come and go."""
    queue = FairQueue()
    queue.charge(ticket(0, "a", 100))
    for number in range(1, 1_001):
        waiting = ticket(number, "a", 1)
        queue.add(waiting)
        queue.remove(waiting)

        assert sum(len(heap) for heap in queue._heaps.values()) <= 128
    queue.add(ticket(2_000, "a", 1))
    queue.add(ticket(2_001, "b", 1))
    assert [served.number for served in iter(lambda: serve(queue), None)] == [2_001, 2_000]


def test_keys_that_come_once_are_forgotten_when_the_others_have_caught_up() -> None:
    queue = FairQueue()
    for number in range(1000):
        for key in ("steady", f"passing {number}"):
            once = ticket(number, key, 10)
            queue.charge(once)
            queue.settle(once, 10)

    assert len(queue.accounts) < 10, "what is kept follows the keys in use, not all there ever were"
