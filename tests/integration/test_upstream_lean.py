"""The lean path to the engines and the session in its place: the same answers, the same failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.doubles.waiting import until

from gateway.upstream import BrokenConnection, ConnectError, Upstream

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Engine:
    """A server that answers each request with the next script."""

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(length))
                answer = self._answers.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                if b"cut-here" in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self.closed.set()
            writer.close()


@pytest.fixture(params=["lean", "session"])
async def upstream(request: pytest.FixtureRequest) -> AsyncIterator[Upstream]:
    found = Upstream(20.0)
    assert found.lean
    found.lean = request.param == "lean"
    yield found
    await found.close()


async def started(engine: Engine) -> tuple[asyncio.Server, str]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/x?y=1"


async def whole(upstream: Upstream, url: str, body: bytes = b"{}") -> tuple[int, bytes]:
    route = upstream.route("POST", url, {"content-type": "application/json"})
    exchange = await upstream.open(route, {"x-request-id": "r"}, body)
    parts = b""
    try:
        while part := await exchange.read():
            parts += part
    except BrokenConnection:
        exchange.close()
        raise
    exchange.release()
    return exchange.status, parts


async def test_answers_and_reuse_of_the_connection(upstream: Upstream) -> None:
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n"
    sized = HEAD + b"Content-Length: 2\r\n\r\nok"
    informed = b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" + sized
    zipped = HEAD + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    engine = Engine(chunked, sized, informed, zipped, empty, sized)
    server, url = await started(engine)
    async with server:
        found = [await whole(upstream, url, b"x" * size) for size in (0, 2, 70_000, 3_000_000, 1, 1)]
    assert found == [(200, b"abcde"), (200, b"ok"), (200, b"ok"), (200, b"\x1f\x8b\x08"), (204, b""), (200, b"ok")]
    assert engine.connections == 1
    assert [len(r.partition(b"\r\n\r\n")[2]) for r in engine.requests] == [0, 2, 70_000, 3_000_000, 1, 1]
    assert engine.requests[0].startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n")
    fields = engine.requests[1].lower()
    assert fields.count(b"\r\nhost: 127.0.0.1:") == 1
    assert b"\r\nx-request-id: r\r\n" in fields
    assert b"user-agent" not in fields
    assert b"cookie" not in fields


async def test_connection_that_the_engine_wants_closed_is_not_used_again(upstream: Upstream) -> None:
    engine = Engine(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", HEAD + b"Content-Length: 2\r\n\r\nok")
    server, url = await started(engine)
    async with server:
        assert await whole(upstream, url) == (200, b"ok")
        assert await whole(upstream, url) == (200, b"ok")
    assert engine.connections == 2


@pytest.mark.parametrize(
    "broken",
    [
        HEAD + b"Content-Length: 100\r\n\r\ncut-here",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n8\r\ncut-here\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n8\r\ncut-here\r\nxyz\r\n",
    ],
)
async def test_broken_body(upstream: Upstream, broken: bytes) -> None:
    server, url = await started(Engine(broken))
    async with server:
        with pytest.raises(BrokenConnection):
            await whole(upstream, url)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 200 cut-here", b"nonsense cut-here\r\n\r\n"])
async def test_no_head(upstream: Upstream, answer: bytes | None) -> None:
    server, url = await started(Engine(answer))
    async with server:
        with pytest.raises(BrokenConnection):
            await upstream.open(upstream.route("POST", url, {}), {}, b"{}")


async def test_nobody_listens(upstream: Upstream) -> None:
    server, url = await started(Engine())
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectError):
        await upstream.open(upstream.route("POST", url, {}), {}, b"{}")


@pytest.mark.parametrize("phase", ["head", "body"])
async def test_giving_up_closes_the_connection(upstream: Upstream, phase: str) -> None:
    """The engine stops working only when its connection ends."""
    engine = Engine(b"" if phase == "head" else HEAD + b"Content-Length: 10\r\n\r\nabc")
    server, url = await started(engine)
    async with server:
        if phase == "head":
            opening = asyncio.create_task(upstream.open(upstream.route("POST", url, {}), {}, b"{}"))
            await until("the engine has the request", lambda: engine.requests)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
        else:
            exchange = await upstream.open(upstream.route("POST", url, {}), {}, b"{}")
            assert await exchange.read() == b"abc"
            exchange.close()
        async with asyncio.timeout(60):
            await engine.closed.wait()


async def test_header_with_a_line_break_is_not_sent(upstream: Upstream) -> None:
    engine = Engine(HEAD + b"Content-Length: 2\r\n\r\nok")
    server, url = await started(engine)
    async with server:
        with pytest.raises((ValueError, BrokenConnection)):
            await upstream.open(upstream.route("POST", url, {}), {"x-a": "b\r\nx-c: d"}, b"{}")
    assert all(b"x-c" not in sent for sent in engine.requests)


async def test_engine_that_sends_unasked_bytes_loses_the_connection(upstream: Upstream) -> None:
    """Bytes after an answer would be taken for the next caller's."""
    sized = HEAD + b"Content-Length: 2\r\n\r\nok"
    engine = Engine(sized + HEAD + b"Content-Length: 4\r\n\r\nevil", sized)
    server, url = await started(engine)
    async with server:
        assert await whole(upstream, url) == (200, b"ok")
        assert await whole(upstream, url) == (200, b"ok")
    assert engine.connections == 2
