"""Calls, engines and settings for tests of capacity and dispatch."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from gateway.backends import Backend, Probe, Registry
from gateway.call import Call, Caller, Priority
from gateway.settings import Settings, load
from gateway.stages.capacity import Capacity
from gateway.stages.dispatch import choose
from gateway.wire import ENDPOINTS, Request
from tests.doubles.clock import virtual_now

_numbers = itertools.count(1)
CHAT = ENDPOINTS["/v1/chat/completions"]


def settings(**variables: Any) -> Settings:
    """Settings from variables in any case."""
    return load({name.upper(): str(value) for name, value in variables.items()})


async def healthy(_: Backend) -> Probe:
    """A poll that finds the engine well, serving `m`."""
    return Probe(True, ("m",), 8192)


def registry(up: bool = True, clock: Any = virtual_now, **variables: Any) -> Registry:
    """The engines of `variables`, already found healthy when `up`."""
    engines = Registry.of(settings(**variables), healthy)
    engines.clock = clock
    if up:
        for backend in engines.backends:
            engines.note(backend, Probe(True, ("m",), 8192))
    return engines


def capacity(up: bool = True, **variables: Any) -> Capacity:
    """Capacity over virtual time."""
    variables = {"engine_concurrency": 2, "queue_calls": 8, "queue_seconds": 30, **variables}
    engines = registry(up, **variables)
    return Capacity(settings(**variables), engines, choose, clock=virtual_now)


def call(
    key: str = "a",
    prompt: int = 100,
    output: int | None = 100,
    *,
    weight: int = 1,
    priority: Priority = Priority.NORMAL,
    asked: Priority | None = None,
    model: str = "m",
    affinity: int | None = None,
    endpoint: Any = CHAT,
    raw: bytes = b"{}",
) -> Call:
    """A call that has passed auth and budget."""
    made = Call(f"r{next(_numbers)}", endpoint, "127.0.0.1")
    made.caller = Caller(key, key, weight=weight, priority=priority)
    request = Request(endpoint, raw, model)
    request.prompt_estimate = prompt
    request.max_output = output
    request.priority = asked
    request.affinity = affinity
    made.request = request
    return made


def used(made: Call, prompt: int, completion: int) -> Call:
    """The engine has reported usage."""
    made.usage.known = True
    made.usage.prompt = prompt
    made.usage.completion = completion
    return made


def waiting(room: Capacity, made: Call) -> asyncio.Task[None]:
    """A task that enters."""
    made.task = asyncio.create_task(room.enter(made))
    return made.task


async def settle_down() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


def places(room: Capacity) -> int:
    """Places taken in all engines."""
    return sum(backend.in_flight for backend in room._registry.backends)
