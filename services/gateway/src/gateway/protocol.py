"""The connection protocol: bytes of one client become exchanges, in order, and every state has an end.

One `Connection` reads heads (head.py), bodies and pipelined requests, and runs one exchange (exchange.py) at a time.
What it may be doing, and what ends that:

| state | ends by |
|---|---|
| idle, no byte of a request | the first byte; `idle_seconds`; drain |
| reading a head | its empty line; `head_seconds` since its first byte (408); `HEAD_BYTES` (431) |
| reading a body | its end; `body_stall_seconds` of silence, `body_seconds` in all (408); `body_bytes` (413) |
| answering | the application; the client leaves (end of file counts: leaving and half-closing look the same) |
| not read, because enough has come | the application takes some; the client leaves, as the sweep asks the kernel |
| stalled, the client does not read | the client reads; `write_stall_seconds` |
| discarding a body that the answer did not need | its end; `body_stall_seconds` |
| lingering after a last answer, so that it is not lost to a reset | end of file; `linger_seconds` |

Deadlines are one number a connection, looked at by one sweep a second for all: no timer is set or cleared per call.
"""

from __future__ import annotations

import asyncio
import re
import select
from typing import TYPE_CHECKING, Any

from loguru import logger

from gateway.bounds import refusal
from gateway.chunked import Chunked
from gateway.exchange import Exchange
from gateway.head import HEAD_BYTES, MALFORMED, Head, Refused, parse_head

if TYPE_CHECKING:
    from gateway.connections import Connections

DISCARD_BYTES = 262_144  # an unread body up to this is read and dropped to keep the connection
_BARE_LF = re.compile(rb"(?<!\r)\n")
_NEVER = float("inf")


class Connection(asyncio.Protocol):
    """One client's connection over HTTP/1.1."""

    __slots__ = (
        "_body_end", "_buffer", "_connections", "_discard", "_ending", "_exchange", "_loop", "_paused", "_peer",
        "_scanned", "_server", "_waiter", "closed", "deadline", "stalled", "transport",
    )  # fmt: skip

    def __init__(self, connections: Connections, loop: asyncio.AbstractEventLoop) -> None:
        self._connections = connections
        self._loop = loop
        self._buffer = b""  # bytes of requests that have not begun
        self._scanned = 0  # how far the buffer was searched for the head's end
        self._discard = 0  # body bytes to drop before the next request
        self._exchange: Exchange | None = None
        self._ending = False  # the last byte was written; what still comes is dropped
        self._paused = False
        self._body_end = _NEVER
        self._waiter: asyncio.Future[None] | None = None  # a sender waits for the client to read
        self.transport: Any = None  # of asyncio; the running exchange writes to it
        self.closed: asyncio.Future[None] = loop.create_future()
        self.deadline = _NEVER
        self.stalled = False  # the client reads more slowly than we write

    # asyncio's callbacks

    def connection_made(self, transport: Any) -> None:
        """Take the connection; refuse it when there are too many."""
        self.transport = transport
        peer, server = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._peer = tuple(peer[:2]) if isinstance(peer, tuple) else None
        self._server = tuple(server[:2]) if isinstance(server, tuple) else None
        connections = self._connections
        connections.open.add(self)
        self.deadline = self._loop.time() + connections.bounds.head_seconds
        if len(connections.open) > connections.bounds.connections:
            self._refuse(503, "Too many connections.")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._connections.open.discard(self)
        self._connections.unread.discard(self)
        self.deadline = _NEVER
        self._ending = True
        self.resume_writing()
        if self._exchange is not None:
            self._exchange.lose()
        if not self.closed.done():
            self.closed.set_result(None)

    def eof_received(self) -> bool:
        """The client left, or half-closed, which looks the same and is answered as nginx and stock Hypercorn do."""
        if self._exchange is not None:
            self._exchange.lose()
        self._ending = True
        self.deadline = self._loop.time() + self._connections.bounds.linger_seconds
        return False

    def pause_writing(self) -> None:
        """The client does not read: senders wait, but not for ever."""
        self.stalled = True
        self.deadline = self._loop.time() + self._connections.bounds.write_stall_seconds

    def resume_writing(self) -> None:
        """The client reads again."""
        if self.stalled:
            self.stalled = False
            if not self._ending:
                self.deadline = _NEVER if self._exchange is not None else self._idle_deadline()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Bytes came: of a body, of the next request, or of nobody's interest."""
        exchange = self._exchange
        if self._ending:
            return
        if exchange is not None:
            if exchange.body_left:
                self._feed(exchange, data)
            else:
                self._buffer += data  # pipelined: kept, in order, and no more than about a head's worth
                if len(self._buffer) > HEAD_BYTES:
                    self.pause()
            return
        if self._discard:
            dropped = min(self._discard, len(data))
            self._discard -= dropped
            data = data[dropped:]
            self.deadline = self._loop.time() + self._connections.bounds.body_stall_seconds
            if self._discard:
                return
        self._buffer = self._buffer + data if self._buffer else data
        self._next_request()

    # Requests

    def _next_request(self) -> None:
        """Start the next exchange if its head has come whole; else set the deadline for what is missing."""
        buffer = self._buffer
        while buffer[:2] == b"\r\n":  # empty lines before a request are ignored (RFC 9112, 2.2)
            buffer = buffer[2:]
            self._scanned = 0
        self._buffer = buffer
        end = buffer.find(b"\r\n\r\n", self._scanned) + 4
        if end < 4 or end > HEAD_BYTES:
            self._wait_for_head(buffer)
            return
        self._scanned = 0
        try:
            head = parse_head(buffer[:end])
        except Refused as error:
            self._refuse(error.status, error.message)
            return
        self._buffer = b""
        self._start(head, buffer[end:])

    def _wait_for_head(self, buffer: bytes) -> None:
        if not buffer or buffer == b"\r":
            self.deadline = self._idle_deadline()
            return
        seen = buffer[:HEAD_BYTES]
        # What can no longer become a request is refused at once, and by the same rule however the bytes were cut.
        if not 65 <= buffer[0] <= 90 or _BARE_LF.search(seen, max(0, self._scanned)):
            self._refuse(400, MALFORMED)
        elif len(buffer) > HEAD_BYTES:
            self._refuse(431, f"The request's head is larger than {HEAD_BYTES} bytes.")
        else:
            if self._scanned == 0:
                self.deadline = self._loop.time() + self._connections.bounds.head_seconds
            self._scanned = max(1, len(buffer) - 3)

    def _start(self, head: Head, rest: bytes) -> None:
        exchange = self._exchange = Exchange(self, head)
        if head.length:
            if head.length < 0:
                exchange.chunks = Chunked()
            self._body_end = self._loop.time() + self._connections.bounds.body_seconds
            if rest:
                self._feed(exchange, rest)
            else:
                self._body_deadline()
        else:
            self._buffer = rest
            self.deadline = _NEVER
        connections = self._connections
        conversation = None
        if connections.relay is not None:
            conversation = connections.relay(exchange, head, self._peer)
        if conversation is None:
            scope = exchange.scope(head, self._peer, self._server)
            conversation = connections.application(scope, exchange.receive, exchange.send)
        exchange.task = self._loop.create_task(exchange.run(conversation))

    def _feed(self, exchange: Exchange, data: bytes) -> None:
        left = exchange.body_left
        if left > 0:
            if len(data) > left:
                self._buffer = data[left:]
                data = data[:left]
            exchange.body_left = left - len(data)
            exchange.take_body(data)
        else:
            try:
                pieces = exchange.chunks.feed(data)
            except Refused as error:
                self._fail(exchange, error.status, error.message)
                return
            if exchange.chunks.done:
                exchange.body_left = 0
                self._buffer = exchange.chunks.rest
            for piece in pieces:
                exchange.take_body(piece)
            exchange.wake()
        if exchange.body_read > self._connections.bounds.body_bytes:
            self._fail(exchange, 413, f"The body is larger than {self._connections.bounds.body_bytes} bytes.")
        elif exchange.body_left:
            self._body_deadline()
        elif not self.stalled:
            self.deadline = _NEVER

    def _fail(self, exchange: Exchange, status: int, message: str) -> None:
        """The request cannot be finished: answer it if nothing was answered yet, and let the application go."""
        begun = exchange.started
        exchange.lose()
        if begun:
            self.abort()
        else:
            self._refuse(status, message)

    def exchange_ended(self, exchange: Exchange) -> None:
        """The application returned. Called by the exchange, in the application's task."""
        self._exchange = None
        if self._ending or self.transport.is_closing():
            return
        if not exchange.answered:
            if not exchange.started:
                self._refuse(500, "Internal error.")
            elif exchange.framed:
                self._close()  # without its last chunk or byte the client sees that the answer is not whole
            else:
                self.abort()  # … and without framing only a reset can tell
        elif exchange.must_close or self._connections.draining:
            if exchange.body_left or self._buffer:
                self._linger()
            else:
                self._close()
        else:
            self._discard = exchange.body_left
            if self._paused:
                self.resume()
            self.deadline = self._loop.time() + self._connections.bounds.body_stall_seconds
            if not self._discard:
                self.deadline = self._idle_deadline()
                if self._buffer:
                    self._next_request()

    def can_go_on(self, exchange: Exchange) -> bool:
        """Whether another request can follow on this connection, seen when the response's head is written."""
        if self._connections.draining:
            return False
        left = exchange.body_left
        return left == 0 or (0 < left <= DISCARD_BYTES and not exchange.send_continue)

    # Ends

    def expire(self) -> None:
        """The deadline passed: end what was being waited for."""
        exchange = self._exchange
        if self._ending or self.stalled:
            self.abort()
        elif exchange is not None:
            self._fail(exchange, 408, "The request's body did not arrive in time.")
        elif self._buffer not in (b"", b"\r"):
            self._refuse(408, "The request's head did not arrive in time.")
        else:
            self._close()

    def close_if_idle(self) -> None:
        """Close the connection unless a request is being answered."""
        if self._exchange is None and not self._ending:
            self._close()

    def _refuse(self, status: int, message: str) -> None:
        logger.debug("server_refused", status=status)
        self.transport.write(refusal(status, message))
        self._linger()

    def _linger(self) -> None:
        """Send what is written, then drop what still comes: closing at once would reset and could lose the answer."""
        self._close(linger=True)

    def _close(self, linger: bool = False) -> None:
        self._ending = True
        self._buffer = b""
        bounds = self._connections.bounds
        self.deadline = self._loop.time() + (bounds.linger_seconds if linger else bounds.write_stall_seconds)
        if self.transport.is_closing():
            return
        if linger:
            if self._paused:
                self.resume()
            self.transport.write_eof()
        else:
            self.transport.close()

    def abort(self) -> None:
        """End the connection now; the client sees a reset."""
        self._ending = True
        if self._exchange is not None:
            self._exchange.lose()
        self.transport.abort()

    def cancel(self) -> asyncio.Task[None] | None:
        """Abort, cancel the application, and return its task."""
        task = self._exchange.task if self._exchange is not None else None
        self.abort()
        if task is not None:
            task.cancel()
        return task

    # Flow

    def finish(self) -> None:
        """The last byte of the last answer is written: say so at once, and drop what still comes."""
        if not self._ending:
            self._linger()

    def write(self, data: bytes) -> None:
        """Write bytes of a response."""
        self.transport.write(data)

    async def drained(self) -> None:
        """Return when the client has read enough of what was written, or has gone."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def pause(self) -> None:
        """Read no more for now."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self._connections.unread.add(self)
            self.transport.pause_reading()
            if not self.stalled:
                self.deadline = _NEVER  # the application is what is waited for

    def resume(self) -> None:
        """Read again."""
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self._connections.unread.discard(self)
            self.transport.resume_reading()
            if self._exchange is not None and self._exchange.body_left:
                self._body_deadline()

    def left(self) -> bool:
        """Whether the client has closed its side, behind bytes that may not have been read."""
        if self.transport.is_closing():
            return False  # its file may be closed already, and the sweep serves all
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def _body_deadline(self) -> None:
        if not self._paused:
            stall = self._loop.time() + self._connections.bounds.body_stall_seconds
            self.deadline = min(stall, self._body_end)

    def _idle_deadline(self) -> float:
        return self._loop.time() + self._connections.bounds.idle_seconds
