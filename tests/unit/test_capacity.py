"""Entering and leaving: places, waiting, refusals, cancellation in every state, retries. In virtual time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.doubles.clock import run_virtual, virtual, virtual_now
from tests.doubles.flow import call, capacity, places, settle_down, used, waiting

from gateway.backends import Probe
from gateway.call import Call, Priority
from gateway.errors import GatewayError, QueueFull, QueueTimeout
from gateway.stages.capacity import Capacity

TWO = json.dumps([{"name": n, "url": f"http://{n}:1", "models": ["m"]} for n in ("one", "two")])


@virtual
async def test_a_free_place_is_taken_without_waiting() -> None:
    room = capacity()
    made = call()

    await room.enter(made)

    assert made.backend.name == "vllm"
    assert (made.queue_seconds, made.stage, places(room)) == (0.0, "dispatch", 1)
    room.leave(made)
    room.leave(made)
    assert (places(room), made.backend.outstanding) == (0, 0.0)


@virtual
async def test_a_place_goes_to_the_next_in_the_turn_in_which_it_becomes_free() -> None:
    room = capacity(engine_concurrency=1)
    first, second = call(), call("b")
    await room.enter(first)
    task = waiting(room, second)
    await asyncio.sleep(2.5)
    assert room.waiting() == {"high": 0, "normal": 1, "low": 0}
    (entry,) = room.queue()
    assert (entry["key_id"], entry["waited_seconds"], entry["why"]) == ("b", 2.5, "engines_busy")

    room.leave(first)

    assert places(room) == 1
    await task
    assert (second.queue_seconds, virtual_now()) == (2.5, 2.5)


@virtual
async def test_the_longest_wait_ends_in_503_with_a_time_to_come_back() -> None:
    room = capacity(engine_concurrency=1, queue_seconds=5)
    await room.enter(call())
    late = call()

    with pytest.raises(QueueTimeout) as caught:
        await room.enter(late)

    assert virtual_now() == pytest.approx(5.0)
    assert caught.value.retry_after >= 1
    room.leave(late)
    assert room.room.calls == 0


@virtual
async def test_a_full_room_refuses_with_a_time_to_come_back() -> None:
    room = capacity(engine_concurrency=1, queue_calls=2)
    await room.enter(call())
    tasks = [waiting(room, call()) for _ in range(2)]
    await settle_down()

    with pytest.raises(QueueFull) as caught:
        await room.enter(call())

    assert caught.value.retry_after >= 1
    assert not any(task.done() for task in tasks)


@virtual
async def test_a_light_key_finds_room_in_a_room_full_of_a_heavy_one() -> None:
    room = capacity(engine_concurrency=1, queue_calls=8)
    running = call("hog")
    await room.enter(running)
    hogs = [call("hog") for _ in range(9)]
    tasks = [waiting(room, hog) for hog in hogs]
    await settle_down()

    light = call("light")
    entering = waiting(room, light)
    await settle_down()

    assert isinstance(tasks[8].exception(), QueueFull), "there was no place for it"
    assert isinstance(tasks[7].exception(), QueueFull), "pushed out"
    room.leave(running)
    await settle_down()
    assert entering.done()
    assert not tasks[0].done()
    assert places(room) == 1


@virtual
async def test_what_a_heavy_key_was_promised_does_not_shut_out_a_light_one() -> None:
    """Half of the room waits, all of the rest and more is promised to the same key."""
    room = capacity(engine_concurrency=1, queue_calls=8)
    running = call("hog")
    await room.enter(running)
    tasks = [waiting(room, call("hog")) for _ in range(12)]
    await settle_down()
    assert [task.done() for task in tasks].count(True) == 4, "refused, and told to come back"
    for task in tasks[4:8]:
        task.cancel()
    await asyncio.gather(*tasks[4:8], return_exceptions=True)
    for entry in room.room.waiting()[4:]:
        room.leave(entry.call)
    assert room.waiting()["normal"] == 4

    light = waiting(room, call("light"))
    stranger = waiting(room, call("stranger"))
    more = waiting(room, call("hog"))
    await settle_down()

    assert not light.done()
    assert not stranger.done()
    assert isinstance(more.exception(), QueueFull), "its own promises count against itself"
    assert not any(task.done() for task in tasks[:4]), "and nobody had to leave"


@virtual
async def test_what_keys_were_promised_within_their_share_is_kept_from_newcomers() -> None:
    room = capacity(engine_concurrency=1, queue_calls=4)
    await room.enter(call("first"))
    tasks = [waiting(room, call(f"key{n}")) for n in range(8)]
    await settle_down()
    assert [task.done() for task in tasks] == [False] * 4 + [True] * 4
    room.leave(room.room.waiting()[0].call)

    late = waiting(room, call("late"))
    await settle_down()

    assert isinstance(late.exception(), QueueFull), "the free place is promised to a key that has nothing"


@virtual
async def test_several_keys_that_fill_the_room_do_not_shut_out_another() -> None:
    room = capacity(engine_concurrency=1, queue_calls=8)
    await room.enter(call("hog"))
    tasks = [waiting(room, call(("hog", "pig")[n % 2])) for n in range(8)]
    await settle_down()

    light = waiting(room, call("light"))
    await settle_down()

    assert not light.done()
    assert [task.done() for task in tasks].count(True) == 1, "one of theirs had to leave"


@virtual
async def test_no_room_at_all_is_a_valid_size() -> None:
    room = capacity(engine_concurrency=1, queue_calls=0)
    await room.enter(call())

    with pytest.raises(QueueFull):
        await room.enter(call("b"))


@virtual
async def test_cancellation_gives_back_what_was_taken_in_every_state() -> None:
    room = capacity(engine_concurrency=1)
    first, second, third = call("a"), call("b"), call("c")
    await room.enter(first)
    tasks = [waiting(room, second), waiting(room, third)]
    await settle_down()

    tasks[0].cancel()  # while it waits
    await asyncio.gather(tasks[0], return_exceptions=True)
    room.leave(second)
    assert room.room.calls == 1

    room.leave(first)  # the place goes to the third …
    assert third.backend is not None
    tasks[1].cancel()  # … which is cancelled before it learns of it
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    room.leave(third)

    assert (places(room), room.room.calls) == (0, 0)


@virtual
async def test_an_error_that_meets_a_cancellation_is_not_lost_in_the_loop() -> None:
    problems: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    room = capacity(engine_concurrency=1, queue_calls=1)
    await room.enter(call())
    hog = call("hog")
    task = waiting(room, hog)
    await settle_down()
    other = waiting(room, call("high", priority=Priority.HIGH))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    room.leave(hog)
    del task
    other.cancel()
    await settle_down()

    assert problems == []


@virtual
async def test_a_caller_may_lower_its_class_and_never_raise_it() -> None:
    room = capacity(engine_concurrency=1)
    running = call()
    await room.enter(running)
    for made in (
        call("a", priority=Priority.NORMAL, asked=Priority.HIGH),
        call("b", priority=Priority.HIGH, asked=Priority.LOW),
        call("c", priority=Priority.LOW),
    ):
        waiting(room, made)
    await settle_down()

    assert [entry["priority"] for entry in room.queue()] == ["normal", "low", "low"]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "enter", "leave", "cancel", "retry", "fail", "succeed", "sick", "well", "pass"]),
        st.integers(0, 30),
        st.sampled_from("abc"),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS, st.integers(0, 4), st.integers(1, 3))
def test_places_are_conserved_whatever_happens(
    actions: list[tuple[str, int, str]], queue_calls: int, concurrency: int
) -> None:
    async def main() -> None:
        room = capacity(
            queue_calls=queue_calls,
            engine_concurrency=concurrency,
            queue_seconds=3,
            breaker_failures=2,
            breaker_seconds=1,
            backends=TWO,
        )
        engines = room._registry
        live: list[tuple[Call, asyncio.Task[None]]] = []
        for what, which, key in actions:
            picked = live[which % len(live)] if live else None
            backend = engines.backends[which % 2]
            if what == "enter":
                made = call(key, prompt=which * 10, priority=list(Priority)[which % 3])
                live.append((made, waiting(room, made)))
            elif what in ("leave", "cancel") and picked:
                live.remove(picked)
                if what == "cancel" or not picked[1].done():
                    picked[1].cancel()
                    await asyncio.gather(picked[1], return_exceptions=True)
                room.leave(used(picked[0], which, which))
            elif what == "retry" and picked and picked[1].done():
                room.reroute(picked[0], [picked[0].backend] if which % 2 else [])
            elif what in ("fail", "succeed"):
                engines.report(backend, what == "succeed")
            elif what in ("sick", "well"):
                engines.note(backend, Probe(what == "well", ("m",)))
            elif what == "pass":
                await asyncio.sleep(which / 10)
            await asyncio.sleep(0)
            check(room, [made for made, _ in live])
        for made, task in live:
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            assert outcome is None or isinstance(outcome, GatewayError | asyncio.CancelledError)
            room.leave(made)
        check(room, [])
        room.close()
        assert (places(room), room.room.calls, room.room.tokens) == (0, 0, 0.0)

    def check(room: Capacity, live: list[Call]) -> None:
        now = virtual_now()
        for backend in room._registry.backends:
            holders = [made for made in live if made.grant is not None and made.grant.backend is backend]
            assert backend.in_flight == len(holders) <= backend.limit
            assert backend.outstanding == pytest.approx(sum(made.grant.cost for made in holders))
            assert not (room.room.calls and backend.free(now)), "no place lies idle while somebody waits"
        assert room.room.calls <= room.room.limit_calls
        assert room.room.calls == sum(queue.calls for queue in room.room.classes)

    run_virtual(main())
