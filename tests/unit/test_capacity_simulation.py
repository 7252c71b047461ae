"""A day at the edge of the engine, in virtual time: fairness, throughput, and whether `Retry-After` is true."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from tests.doubles.clock import run_virtual, virtual_now
from tests.doubles.flow import call, capacity, used

from gateway.call import Priority
from gateway.errors import QueueFull, QueueTimeout
from gateway.stages.capacity import Capacity

TOKEN_SECONDS = 0.01


@dataclass
class Tally:
    """What happened to the callers of one key."""

    tokens: int = 0
    calls: int = 0
    refused: int = 0
    first_token: list[float] = field(default_factory=list)
    longest_wait: float = 0.0


class World:
    """Callers against one capacity; the engine works at a fixed pace in each place."""

    def __init__(self, room: Capacity, seed: int = 1, prefill_seconds: float = 0.05) -> None:
        self.room = room
        self.prefill_seconds = prefill_seconds
        self.random = random.Random(seed)
        self.tally: defaultdict[str, Tally] = defaultdict(Tally)
        self.back: list[tuple[float, bool]] = []  # who came back after waiting as told: when, and whether it was served

    async def one(self, key: str, prompt: int, output: int, known: bool = True, **more: object) -> None:
        """One call: waits for a place, is worked on, leaves. Raises what `enter` raises."""
        made = call(key, prompt, output if known else None, **more)
        began = virtual_now()
        try:
            await self.room.enter(made)
            tally = self.tally[key]
            tally.longest_wait = max(tally.longest_wait, virtual_now() - began)
            await asyncio.sleep(self.prefill_seconds + TOKEN_SECONDS)
            tally.first_token.append(virtual_now() - began)
            await asyncio.sleep(TOKEN_SECONDS * (output - 1))
            used(made, prompt, output)
            tally.tokens += prompt + output
            tally.calls += 1
        finally:
            self.room.leave(made)

    async def caller(self, key: str, size: Callable[[], tuple[int, int]], **more: object) -> None:
        """Calls one after the other for ever; comes back as told."""
        told = False
        wanted = size()
        while True:
            came, came_back = virtual_now(), told
            try:
                await self.one(key, *wanted, raw=f"{id(size)} {wanted}".encode(), **more)
                told = False
                wanted = size()
            except (QueueFull, QueueTimeout) as refusal:
                told = True
                self.tally[key].refused += 1
                # Whole seconds, as in the header; then the way back.
                await asyncio.sleep((refusal.retry_after or 0.0) + self.random.uniform(0.0, 0.3))
            if came_back:
                self.back.append((came, not told))

    async def visitors(self, rate: float, keys: int, until: float) -> None:
        """`rate` single calls a second, each of the next of many keys; they do not come back."""

        async def visitor(key: str) -> None:
            try:
                await self.one(key, 300, 100, raw=str(virtual_now()).encode())
            except (QueueFull, QueueTimeout):
                self.tally[key].refused += 1

        number = 0
        while virtual_now() < until:
            await asyncio.sleep(self.random.expovariate(rate))
            asyncio.create_task(visitor(f"visitor{number % keys}"))  # noqa: RUF006 run_virtual ends them
            number += 1

    def kept(self, since: float) -> tuple[float, int]:
        """The share of promises that were kept to those who came back after `since` seconds, and how many came."""
        came = [served for when, served in self.back if when >= since]
        return sum(came) / max(1, len(came)), len(came)

    def sizes(self, prompt: int, output: int) -> Callable[[], tuple[int, int]]:
        """Sizes around a mean."""
        return lambda: (
            self.random.randint(prompt // 2, prompt * 3 // 2),
            self.random.randint(output // 2, output * 3 // 2),
        )


def simulate(
    world_of: Callable[[], World], crowd: list[tuple[str, int, int, int]], seconds: float, **more: object
) -> World:
    """`crowd`: (key, callers, prompt, output) each."""

    async def main() -> World:
        world = world_of()
        for key, callers, prompt, output in crowd:
            for _ in range(callers):
                asyncio.create_task(world.caller(key, world.sizes(prompt, output), **more))  # noqa: RUF006 run_virtual ends them
        await asyncio.sleep(seconds)
        return world

    return run_virtual(main())


def jain(values: list[float]) -> float:
    """Jain's index: 1 when all are equal."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


HEAVY = ("heavy", 200, 400, 120)
LIGHT = [(f"light{n}", 6, 100, 40) for n in range(5)]


def fair_world(**variables: object) -> Callable[[], World]:
    return lambda: World(capacity(engine_concurrency=16, queue_calls=256, **variables))


def test_tokens_are_shared_equally_between_a_heavy_key_and_light_ones() -> None:
    world = simulate(fair_world(), [HEAVY, *LIGHT], 300.0)

    served = [float(world.tally[key].tokens) for key, *_ in [HEAVY, *LIGHT]]
    assert jain(served) >= 0.95, served


def test_a_key_that_asks_for_far_more_than_it_uses_gets_no_credit_by_it() -> None:
    """The heavy key asks for 4,000 tokens a call and uses 60; it was alone before the others came."""

    async def main() -> tuple[World, dict[str, int]]:
        world = fair_world()()

        async def greedy() -> None:
            while True:
                made = call("heavy", 100, 4000)
                await world.room.enter(made)
                await asyncio.sleep(1.0)
                world.tally["heavy"].tokens += 160
                world.room.leave(used(made, 100, 60))

        tasks = [asyncio.create_task(greedy()) for _ in range(200)]
        await asyncio.sleep(20.0)
        tasks += [asyncio.create_task(world.caller("light", world.sizes(100, 60))) for _ in range(40)]
        await asyncio.sleep(1.0)
        before = {key: tally.tokens for key, tally in world.tally.items()}
        await asyncio.sleep(10.0)
        return world, before

    world, before = run_virtual(main())
    gained = {key: tally.tokens - before.get(key, 0) for key, tally in world.tally.items()}
    assert gained["light"] >= 0.8 * gained["heavy"], gained


def test_tokens_are_shared_by_weight() -> None:
    async def main() -> World:
        world = World(capacity(engine_concurrency=8, queue_calls=256))
        for key, weight in (("one", 1), ("three", 3)):
            for _ in range(40):
                asyncio.create_task(world.caller(key, world.sizes(200, 60), weight=weight))  # noqa: RUF006
        await asyncio.sleep(300.0)
        return world

    tally = run_virtual(main()).tally
    assert tally["three"].tokens / tally["one"].tokens == pytest.approx(3.0, rel=0.1)


def test_light_keys_hardly_notice_the_heavy_one() -> None:
    """64 places, as by default; an engine that takes 0.2 s to the first token."""
    light = [(key, 1, prompt, output) for key, _, prompt, output in LIGHT]

    def world() -> World:
        return World(capacity(engine_concurrency=64, queue_calls=256), prefill_seconds=0.2)

    alone = simulate(world, light, 120.0)
    crowded = simulate(world, [HEAVY, *light], 120.0)

    for key, *_ in light:
        solo = percentile(alone.tally[key].first_token, 0.95)
        assert percentile(crowded.tally[key].first_token, 0.95) <= 1.5 * solo, key


def test_fairness_costs_no_throughput() -> None:
    """The same 1,200 calls, fairly and first come, first served (one key for all): how long until all are done?"""

    async def finish(everyone: str | None) -> float:
        world = fair_world(queue_seconds=900)()

        async def caller(key: str, number: int) -> None:
            sizes = random.Random(f"{key}{number}")
            for _ in range(5):
                await world.one(everyone or key, sizes.randint(50, 600), sizes.randint(20, 180))

        callers = [("heavy", 180), *((f"light{n}", 12) for n in range(5))]
        await asyncio.gather(*(caller(key, number) for key, count in callers for number in range(count)))
        return virtual_now()

    fair, first_come = run_virtual(finish(None)), run_virtual(finish("everyone"))

    assert fair <= first_come / 0.95


SMALL = {"engine_concurrency": 8, "queue_calls": 32, "queue_seconds": 20}  # drains 7.6 calls of 400 tokens a second
ONE_BY_ONE = [(f"light{n}", 1, 40, 4) for n in range(5)]
# What is configured, who is there all the time, and single calls of other keys a second.
CROWDS: dict[str, tuple[dict[str, object], list[tuple[str, int, int, int]], float]] = {
    "all keys alike": (SMALL, [(f"key{n}", 12, 300, 100) for n in range(10)], 0.0),
    "one call of each of 200 keys": (SMALL, [(f"key{n}", 1, 300, 100) for n in range(200)], 0.0),
    "keys from small to large": (SMALL, [(f"key{n}", 1 + n, 300, 100) for n in range(14)], 0.0),
    "one light key": (SMALL, [("heavy", 200, 300, 100), ("light", 1, 300, 100)], 0.0),
    "light keys and visitors": (SMALL, [("heavy", 100, 300, 100), *((f"light{n}", 3, 300, 100) for n in range(2))], 2.0),
    "little is left for the heavy key": (SMALL, [("heavy", 60, 300, 100), *((f"light{n}", 3, 300, 100) for n in range(2))], 3.5),
    "two heavy keys": (SMALL, [("heavy", 100, 300, 100), ("heavy too", 100, 300, 100)], 0.5),
    "slow": ({**SMALL, "queue_calls": 512, "queue_seconds": 30}, [("heavy", 80, 80, 300), *ONE_BY_ONE], 0.0),
    "the default sizes": ({"engine_concurrency": 64, "queue_calls": 256}, [("heavy", 400, 400, 600), *ONE_BY_ONE], 0.0),
}  # fmt: skip


@pytest.mark.parametrize(
    ("crowd", "known"),
    [*((crowd, True) for crowd in CROWDS), ("all keys alike", False), ("light keys and visitors", False)],
)
def test_who_waits_as_told_is_let_in_and_light_keys_always_are(crowd: str, known: bool) -> None:
    """More callers than engine and room hold. Who is told to come back is served then; and no call of a key within its
    share is refused because of what the others hold or were promised."""
    variables, people, visits = CROWDS[crowd]

    async def main() -> World:
        world = World(capacity(**variables))
        for key, callers, prompt, output in people:
            for _ in range(callers):
                asyncio.create_task(world.caller(key, world.sizes(prompt, output), known=known))  # noqa: RUF006
        await (world.visitors(visits, 50, 200.0) if visits else asyncio.sleep(200.0))
        return world

    world = run_virtual(main())

    # Not from the first moment on: until a gateway has seen calls end, it guesses how long they take.
    kept, promised = world.kept(since=60.0)
    assert promised > 50, "the test must refuse somebody"
    assert kept >= 0.9, (kept, promised)
    if any(key == "heavy" for key, *_ in people):
        light = {key: tally for key, tally in world.tally.items() if "heavy" not in key}
        assert sum(tally.calls for tally in light.values()) > 100
        assert {key: tally.refused for key, tally in light.items() if tally.refused} == {}


def test_a_wait_that_would_be_too_long_is_refused_early() -> None:
    """A room for 500 calls that drains 4 a second: who is let in does not wait for nothing."""
    crowd = [(f"key{n}", 100, 300, 190) for n in range(5)]
    world = simulate(lambda: World(capacity(engine_concurrency=8, queue_calls=500, queue_seconds=20)), crowd, 400.0)

    timeouts = sum(t.longest_wait >= 20 for t in world.tally.values())
    calls = sum(t.calls for t in world.tally.values())
    waited = percentile([wait for t in world.tally.values() for wait in t.first_token], 0.99)
    assert calls > 1000
    assert timeouts == 0
    assert waited <= 22


def test_a_low_class_fills_what_is_left_and_does_not_starve() -> None:
    async def main() -> World:
        world = World(capacity(engine_concurrency=4, queue_calls=256, queue_seconds=30))
        for _ in range(20):
            asyncio.create_task(world.caller("chat", world.sizes(200, 60), priority=Priority.HIGH))  # noqa: RUF006
            asyncio.create_task(world.caller("batch", world.sizes(200, 60), priority=Priority.LOW))  # noqa: RUF006
        await asyncio.sleep(200.0)
        return world

    tally = run_virtual(main()).tally
    assert tally["batch"].calls > 0
    assert tally["batch"].longest_wait <= 30.0
    assert tally["chat"].tokens > tally["batch"].tokens
