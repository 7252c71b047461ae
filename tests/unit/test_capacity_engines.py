"""Capacity and its engines: none, one that is out, several, retries that move, calls that need no place."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.doubles.clock import virtual
from tests.doubles.flow import call, capacity, places, settle_down, waiting

from gateway.backends import Probe
from gateway.errors import ModelNotFound, NoBackend
from gateway.wire import ENDPOINTS

TWO = json.dumps([{"name": n, "url": f"http://{n}:1", "models": ["m"]} for n in ("one", "two")])


@virtual
async def test_without_an_engine_the_answer_comes_at_once() -> None:
    room = capacity(up=False)
    with pytest.raises(NoBackend):
        await room.enter(call())
    engines = room._registry
    engines.note(engines.backends[0], Probe(True, ("m",)))
    with pytest.raises(ModelNotFound):
        await room.enter(call(model="other"))
    for _ in range(5):
        engines.report(engines.backends[0], False)

    with pytest.raises(NoBackend) as caught:
        await room.enter(call())

    assert caught.value.retry_after == pytest.approx(5.0)


@virtual
async def test_those_who_wait_survive_a_short_outage_and_go_on_by_the_probe() -> None:
    room = capacity(engine_concurrency=1, breaker_failures=1, breaker_seconds=3)
    engines = room._registry
    running = call()
    await room.enter(running)
    tasks = [waiting(room, made := call(str(n))) for n in range(3)]
    made.task = None
    await settle_down()

    engines.report(engines.backends[0], False)
    room.leave(running)
    await asyncio.sleep(2.9)
    assert not any(task.done() for task in tasks)
    assert {entry["why"] for entry in room.queue()} == {"no_engine"}
    await asyncio.sleep(0.2)

    assert [task.done() for task in tasks].count(True) == 1, "one probe"


@virtual
async def test_a_call_that_waits_for_nothing_is_told_the_true_reason() -> None:
    room = capacity(engine_concurrency=1, queue_seconds=4)
    running = call()
    await room.enter(running)
    task = waiting(room, call())
    await settle_down()
    for _ in range(2):
        room._registry.note(room._registry.backends[0], Probe(False))

    with pytest.raises(NoBackend):
        await task


@virtual
async def test_a_retry_moves_the_place_to_another_engine() -> None:
    room = capacity(backends=TWO)
    made = call()
    await room.enter(made)
    old = made.backend

    new = room.reroute(made)

    assert new is not old
    assert (old.in_flight, new.in_flight, old.outstanding, new.outstanding) == (0, 1, 0.0, 200.0)
    room.leave(made)
    assert places(room) == 0


@virtual
async def test_a_retry_stays_where_it_is_when_there_is_no_other_engine() -> None:
    room = capacity()
    made = call()
    await room.enter(made)

    assert room.reroute(made) is made.backend
    assert room.reroute(made, [made.backend]) is None
    assert places(room) == 0, "its place was given up"
    room.leave(made)
    assert places(room) == 0


@virtual
async def test_a_probe_that_ends_without_a_result_does_not_block_the_engine() -> None:
    room = capacity(breaker_failures=1, breaker_seconds=1)
    engines = room._registry
    engines.report(engines.backends[0], False)
    await asyncio.sleep(1.1)
    probe = call()
    await room.enter(probe)
    with pytest.raises(NoBackend):
        await room.enter(call())

    room.leave(probe)  # cancelled: neither good nor bad

    await room.enter(call())


@virtual
async def test_tokenizing_needs_an_engine_but_no_place() -> None:
    room = capacity(engine_concurrency=1)
    await room.enter(call())
    made = call(endpoint=ENDPOINTS["/v1/tokenize"])

    await room.enter(made)

    assert made.backend is not None
    assert places(room) == 1
    room.leave(made)


@virtual
async def test_a_busy_model_does_not_hold_up_another() -> None:
    models = [{"name": n, "url": f"http://{n}:1", "models": [n]} for n in ("big", "small")]
    room = capacity(engine_concurrency=1, queue_calls=1, backends=json.dumps(models))
    await room.enter(call(model="big"))
    waiting(room, call(model="big"))
    await settle_down()

    await room.enter(call(model="small"))

    assert places(room) == 2
