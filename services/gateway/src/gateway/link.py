"""One connection to an engine: requests as bytes out, answers as bytes in, no queue between the socket and the relay.

aiohttp makes and ends the connection (names, addresses, TLS, timeouts); between that, its transport is handed over to
`Link`, which reads answers with llhttp (httptools, strict) and keeps what came until the call takes it, or hands it to
the call at once (`Answer.relay`). A connection that did anything odd is not used again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools

from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.large_body import Buffer

READ_BUFFER_BYTES = 131_072  # of an answer that nobody has taken; above, the socket is not read
HEAD_BYTES = 65_536  # an answer's status line and fields


class ConnectError(UpstreamError):
    """No connection, or an idle one that the engine had closed already: nothing was worked on."""


class BrokenConnection(UpstreamError):
    """The connection broke after the request was sent."""


class Link(asyncio.Protocol):
    """A connection to one engine, for one answer at a time. `idle_since` is loop time while it waits in `pool`."""

    def __init__(self, connection: Any, loop: asyncio.AbstractEventLoop, pool: list[Link]) -> None:
        self._loop = loop
        self._pool = pool
        self._connection = connection  # aiohttp's receipt
        self._handler = connection.protocol  # aiohttp's protocol, which must hear of the end
        self._transport = connection.transport
        self._parser: Any = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._head_bytes = 0
        self._paused = False
        self._interim = False
        self._framed = False  # the answer's end is told by the answer, not by the end of the connection
        self._odd = False  # bytes came that nobody asked for
        self._reusable = False  # the engine keeps the connection after this answer
        self.lost = False
        self.idle_since = 0.0
        self._transport.set_protocol(self)

    # The call's side

    def send(self, request: bytes, body: bytes | list[Buffer]) -> Answer:
        """Write a request; its answer, of which nothing has come yet."""
        answer = self._answer = Answer(self)
        self._head_bytes = 0
        self._reusable = False
        if isinstance(body, bytes) and len(body) <= READ_BUFFER_BYTES:
            self._transport.write(request + body)
        else:
            self._transport.write(request)
            for piece in [body] if isinstance(body, bytes) else body:
                self._transport.write(piece)  # the transport refers to it, and copies nothing
        return answer

    def end(self, answer: Answer) -> None:
        """The call needs no more of `answer`: keep the connection if it is clean, else close it."""
        self._answer = None
        if answer.done and answer.error is None and self._reusable and not self._odd and not self.lost:
            if self._paused:
                self.resume()
            self.idle_since = self._loop.time()
            self._pool.append(self)
        else:
            self.close()

    def close(self) -> None:
        """End the connection; the engine stops working for it."""
        self.lost = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def pause(self) -> None:
        """Read no more for now."""
        if not self._paused and not self.lost:
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._paused and not self.lost:
            self._paused = False
            self._transport.resume_reading()

    # asyncio's callbacks

    def data_received(self, data: bytes) -> None:
        """Bytes of the running answer, or of none."""
        answer = self._answer
        if answer is None:
            self._drop()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._odd = True
            if not answer.done:
                answer.fail("The engine's answer is no HTTP.")
        if not answer.status:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                answer.fail("The head of the engine's answer is too long.")
        answer.arrived()

    def eof_received(self) -> bool:
        """The engine closes. `connection_lost` follows."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended; so has an answer that only its end could end."""
        self.lost = True
        if self._answer is None:
            if self in self._pool:
                self._pool.remove(self)
        else:
            answer = self._answer
            if not answer.done:
                if exc is None and answer.status and not self._framed:
                    answer.done = True
                else:
                    answer.fail("The engine closed the connection before the end of its answer.")
            answer.arrived()
        self._handler.connection_lost(exc)
        self.close()
        self._parser = None  # it knows our callbacks

    def _drop(self) -> None:
        """An idle connection that speaks would answer the next call with somebody else's bytes."""
        if self in self._pool:
            self._pool.remove(self)
        self.close()

    # llhttp's callbacks

    def on_message_begin(self) -> None:
        """A head begins; a second one in the same answer was not asked for."""
        answer = self._answer
        if answer is None or answer.done:
            self._odd = True
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of an answer's fields only its type and its framing matter."""
        if len(name) in (12, 14, 17) and not self._odd:  # content-type, content-length, transfer-encoding
            field = name.lower()
            if field == b"content-type":
                assert self._answer is not None
                self._answer.content_type = value.strip().decode("latin-1")
            elif field in (b"content-length", b"transfer-encoding"):
                self._framed = True

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._odd or self._answer is None:
            return
        status = self._parser.get_status_code()
        self._interim = status < 200
        if not self._interim:
            self._answer.status = status
            if status in (204, 304):
                self._framed = True

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        if not self._odd and self._answer is not None:
            self._answer.pieces.append(data)

    def on_message_complete(self) -> None:
        """The answer, or an interim one, is whole."""
        if self._interim:
            self._interim = False
        elif not self._odd and self._answer is not None:
            self._answer.done = True
            self._reusable = self._parser.should_keep_alive()  # llhttp forgets it after this callback


class Answer:
    """One answer as it comes. `status` is 0 until its head is there; `done` once it is whole."""

    __slots__ = ("_link", "_take", "_waiter", "content_type", "done", "error", "pieces", "status")

    def __init__(self, link: Link) -> None:
        self._link: Link | None = link
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[bytes], bool] | None = None
        self.status = 0
        self.content_type = "application/octet-stream"
        self.pieces: list[bytes] = []  # of the body, not taken yet
        self.done = False
        self.error: str | None = None

    # The link's side

    def fail(self, why: str) -> None:
        """The answer will never be whole."""
        self.error = self.error or why

    def arrived(self) -> None:
        """Something came: hand it on, or wake who waits for it."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            take = self._take
            if take is None:
                if self.status or self.error is not None:
                    waiter.set_result(None)
            else:
                try:
                    if self._hand_over(take):
                        waiter.set_result(None)
                    return
                except Exception as error:  # of the call's; it is raised where the call waits
                    waiter.set_exception(error)
        if len(self.pieces) > 1 and sum(map(len, self.pieces)) > READ_BUFFER_BYTES and self._link is not None:
            self._link.pause()

    def _taken(self) -> bytes:
        """What is there of the body; b"" at its proper end or if nothing has come."""
        pieces = self.pieces
        if not pieces:
            return b""
        self.pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hand_over(self, take: Callable[[bytes], bool]) -> bool:
        """Give `take` what came; whether it wants no more now. What arrived before a break is still good."""
        pieces = self.pieces
        if pieces:
            self.pieces = []
            if take(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
                return True
        if self.error is not None:
            raise BrokenConnection(self.error)
        return self.done and take(b"")

    # The call's side

    async def _wait(self) -> None:
        assert self._link is not None
        self._link.resume()
        self._waiter = self._link._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def head(self) -> None:
        """Wait until `status` is known. Raises `BrokenConnection`."""
        assert self._link is not None
        while not self.status:
            if self.error is not None:
                raise BrokenConnection(self.error)
            self._waiter = self._link._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    @property
    def whole(self) -> bool:
        """Whether nothing more will come."""
        return self.done and not self.pieces

    async def read(self) -> bytes:
        """The bytes that have arrived; waits for at least one; b"" at the proper end. Raises `BrokenConnection`."""
        while not self.pieces and not self.done:
            if self.error is not None:
                raise BrokenConnection(self.error)
            await self._wait()
        return self._taken()

    async def relay(self, take: Callable[[bytes], bool]) -> None:
        """Give `take` every piece when it arrives, b"" at the proper end, until it returns True. Raises what it raises,
        and `BrokenConnection`."""
        if (self.pieces or self.done or self.error is not None) and self._hand_over(take):
            return
        self._take = take
        try:
            await self._wait()
        finally:
            self._take = None

    def close(self) -> None:
        """End the exchange. Before the proper end this closes the connection, which makes the engine stop working."""
        link, self._link = self._link, None
        if link is not None:
            if not self.done:
                self.fail("given up")
            link.end(self)

    def release(self) -> None:
        """Give the connection back after the proper end."""
        self.close()
