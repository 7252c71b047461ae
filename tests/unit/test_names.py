"""The engines' names: what is known goes on to be used while nobody answers."""

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.names import PatientResolver


class Names(AbstractResolver):
    """A resolver that answers when it is told to."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[str | OSError] = asyncio.Queue()
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        answer = await self.answers.get()
        if isinstance(answer, OSError):
            raise answer
        return [ResolveResult(hostname=host, host=answer, port=port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        return


async def told(names: PatientResolver) -> str:
    return (await names.resolve("vllm", 8000))[0]["host"]


async def test_what_is_answered_in_time_counts() -> None:
    inner = Names()
    names = PatientResolver(inner, patience=5)
    for address in ("10.0.0.1", "10.0.0.2"):
        inner.answers.put_nowait(address)
        assert await told(names) == address
    inner.answers.put_nowait(socket.gaierror(socket.EAI_NONAME, "no such name"))
    with pytest.raises(OSError, match="no such name"):
        await told(names)
    await names.close()


async def test_silence_is_bridged_with_what_is_known_and_asked_once() -> None:
    inner = Names()
    names = PatientResolver(inner, patience=0.01)
    inner.answers.put_nowait("10.0.0.1")
    assert await told(names) == "10.0.0.1"
    assert await asyncio.gather(*(told(names) for _ in range(20))) == ["10.0.0.1"] * 20
    assert await told(names) == "10.0.0.1"
    assert inner.asked == 2, "one look-up at a time, however many wait"
    inner.answers.put_nowait("10.0.0.2")  # at last
    while await told(names) != "10.0.0.2":
        await asyncio.sleep(0)
    await names.close()


async def test_the_resolvers_own_end_of_patience_is_silence_too() -> None:
    inner = Names()
    names = PatientResolver(inner, patience=5)
    inner.answers.put_nowait("10.0.0.1")
    await told(names)
    inner.answers.put_nowait(socket.gaierror(socket.EAI_AGAIN, "try again"))
    assert await told(names) == "10.0.0.1"
    await names.close()


async def test_the_first_answer_is_waited_for() -> None:
    inner = Names()
    names = PatientResolver(inner, patience=0)
    waiting = [asyncio.create_task(told(names)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(one.done() for one in waiting)
    inner.answers.put_nowait("10.0.0.1")
    assert await asyncio.gather(*waiting) == ["10.0.0.1"] * 3
    inner.answers.put_nowait(socket.gaierror(socket.EAI_AGAIN, "try again"))
    fresh = PatientResolver(inner, patience=0)
    with pytest.raises(OSError, match="try again"):
        await told(fresh)
    for one in (names, fresh):
        await one.close()


async def test_a_caller_who_leaves_does_not_end_the_others_look_up() -> None:
    inner = Names()
    names = PatientResolver(inner, patience=5)
    leaver, stayer = asyncio.create_task(told(names)), asyncio.create_task(told(names))
    await asyncio.sleep(0)
    leaver.cancel()
    inner.answers.put_nowait("10.0.0.1")
    assert await stayer == "10.0.0.1"
    assert inner.asked == 1
    await names.close()
