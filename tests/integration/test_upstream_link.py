"""Connections to engines at their edges: who reads slowly, who speaks unasked, who never comes to the end of a head."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.doubles.waiting import until

from gateway.errors import UpstreamError
from gateway.link import READ_BUFFER_BYTES
from gateway.upstream import BrokenConnection, Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    found = Upstream(20.0)
    assert found.lean
    yield found
    await found.close()


async def started(serve: Serve) -> tuple[asyncio.Server, str]:
    async def whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(whole, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"


async def request(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(2)


@pytest.mark.parametrize("sort", ["lean", "session"])
async def test_relay_stops_when_told_and_goes_on_where_it_stopped(upstream: Upstream, sort: str) -> None:
    upstream.lean = sort == "lean"
    more = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await more.wait()
        writer.write(b"2\r\nde\r\n0\r\n\r\n")
        await writer.drain()

    server, url = await started(serve)
    async with server:
        exchange = await upstream.open(upstream.route("POST", url, {}), {}, b"{}")
        taken: list[bytes] = []

        def take(data: bytes) -> bool:
            taken.append(data)
            return True

        await exchange.relay(take)
        assert taken == [b"abc"]
        more.set()
        await exchange.relay(take)
        await exchange.relay(take)
        assert taken == [b"abc", b"de", b""]
        exchange.release()


@pytest.mark.parametrize("sort", ["lean", "session"])
async def test_what_a_taker_raises_is_raised_where_the_call_waits(upstream: Upstream, sort: str) -> None:
    upstream.lean = sort == "lean"
    seen = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(HEAD + b"Content-Length: 9\r\n\r\nabc")
        await seen.wait()
        writer.write(b"def")
        await reader.read()

    server, url = await started(serve)
    async with server:
        exchange = await upstream.open(upstream.route("POST", url, {}), {}, b"{}")

        def take(data: bytes) -> bool:
            seen.set()
            if b"def" in data:
                raise UpstreamError("enough")
            return False

        with pytest.raises(UpstreamError, match="enough"):
            await exchange.relay(take)
        exchange.close()


@pytest.mark.parametrize("sort", ["lean", "session"])
async def test_what_came_before_a_break_is_taken_first(upstream: Upstream, sort: str) -> None:
    upstream.lean = sort == "lean"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await writer.drain()

    server, url = await started(serve)
    async with server:
        exchange = await upstream.open(upstream.route("POST", url, {}), {}, b"{}")
        taken: list[bytes] = []
        with pytest.raises(BrokenConnection):
            await exchange.relay(lambda data: taken.append(data) is not None)
        assert taken == [b"abc"]
        exchange.close()


async def test_an_answer_that_nobody_takes_stops_the_engine_and_not_the_memory(upstream: Upstream) -> None:
    size = 64 * 1024 * 1024
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % size)
        piece = bytes(65_536)
        while sent < size:
            writer.write(piece)
            await writer.drain()
            sent += len(piece)

    server, url = await started(serve)
    async with server:
        exchange = await upstream.open(upstream.route("POST", url, {}), {}, b"{}")
        await until("the socket is not read", lambda: exchange._link._paused)  # type: ignore[attr-defined]
        assert sent < size  # most of it is still at the engine's side: sockets hold a few MB
        assert sum(map(len, exchange.pieces)) < READ_BUFFER_BYTES + 524_288  # type: ignore[attr-defined]
        got = 0
        while part := await exchange.read():
            got += len(part)
        assert got == size
        exchange.release()


async def test_an_idle_connection_that_speaks_or_ends_is_not_used_again(upstream: Upstream) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while True:
            await request(reader)
            writer.write(HEAD + b"Content-Length: 2\r\n\r\nok")

    server, url = await started(serve)
    async with server:
        route = upstream.route("POST", url, {})
        for number, unasked in enumerate((b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", None)):
            exchange = await upstream.open(route, {}, b"{}")
            assert await exchange.read() == b"ok"
            exchange.release()
            assert len(route.pool) == 1
            if unasked is None:
                writers[number].close()
            else:
                writers[number].write(unasked)
            await until("the connection leaves the pool", lambda: not route.pool)
        exchange = await upstream.open(route, {}, b"{}")
        assert await exchange.read() == b"ok"
        exchange.release()
        assert len(writers) == 3


@pytest.mark.parametrize("line", [b"X-Long: " + b"a" * 9_000 + b"\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 300])
async def test_a_head_without_end_is_not_waited_for(upstream: Upstream, line: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        if line.startswith(b"X"):
            writer.write(b"HTTP/1.1 200 OK\r\n")
        for _ in range(1_000):
            writer.write(line)
            await writer.drain()

    server, url = await started(serve)
    async with server:
        with pytest.raises(BrokenConnection):
            await upstream.open(upstream.route("POST", url, {}), {}, b"{}")


async def test_an_answer_that_ends_with_its_connection(upstream: Upstream) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request(reader)
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\nuntil the end")
        await writer.drain()

    server, url = await started(serve)
    async with server:
        route = upstream.route("POST", url, {})
        for _ in range(2):
            exchange = await upstream.open(route, {}, b"{}")
            got = b""
            while part := await exchange.read():
                got += part
            assert got == b"until the end"
            exchange.release()
            assert not route.pool
