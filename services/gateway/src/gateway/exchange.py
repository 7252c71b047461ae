"""One request and its response as an ASGI cycle: `receive`, `send`, and how a response becomes bytes.

An exchange belongs to one connection and is let go when its task ends; the application cannot reach a later request
through it. It holds neither the scope nor a traceback, so that no reference cycle outlives a call: the cyclic
collector would otherwise make the slowest calls (docs/profile.md).
"""

from __future__ import annotations

import asyncio
import http
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from gateway.head import Head
    from gateway.protocol import Connection

Application = Callable[[Any, Any, Any], Awaitable[None]]
_ASGI = {"version": "3.0", "spec_version": "2.1"}
BODY_BUFFER_BYTES = 65_536  # request body waiting for the application; above, the socket is not read

_REASONS = {status.value: status.phrase for status in http.HTTPStatus}
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_names: dict[bytes, bytes] = {}  # well-formed response header names -> how a line with them begins; bounded below
_date: tuple[int, bytes] = (0, b"")


def status_line(status: int) -> bytes:
    """The status line with the standard reason; text of others never reaches it."""
    line = _lines.get(status)
    if line is None:
        line = _lines[status] = f"HTTP/1.1 {status:03d} {_REASONS.get(status, '')}\r\n".encode("ascii")
    return line


_lines: dict[int, bytes] = {}


def date_line() -> bytes:
    """The Date field, formatted once a second."""
    global _date
    now = int(time.time())
    if _date[0] != now:
        _date = (now, f"date: {formatdate(now, usegmt=True)}\r\n".encode("ascii"))
    return _date[1]


def _well_formed(name: bytes) -> bytes:
    if _NAME.fullmatch(name) is None:
        raise ValueError(f"malformed response header name {name!r}")
    start = b"" if name.lower() in _FRAMING else b"%b: " % name
    if len(_names) < 1024:
        _names[bytes(name)] = start
    return start


class Exchange:
    """One request being answered. Used by its connection from one side and by the application from the other."""

    __slots__ = (
        "_callback", "_chunked", "_connection", "_head", "_left", "_pieces", "_size", "_status", "_waiter", "answered",
        "body_left", "body_read", "chunks", "gone", "method", "must_close", "send_continue", "started", "task",
        "unannounced", "version",
    )  # fmt: skip

    def __init__(self, connection: Connection, head: Head) -> None:
        self._connection = connection
        self._pieces: list[bytes] = []  # body that the application has not taken
        self._size = 0  # its bytes
        self._waiter: asyncio.Future[None] | None = None  # the application waits in receive()
        self._callback: Callable[[], None] | None = None
        self._head: bytes | None = None  # response head that waits for the first body message
        self._status = 0
        self._left: int | None = None  # response bytes that content-length still promises
        self._chunked = False
        self.method = head.method
        self.version = head.version
        self.body_left = head.length  # Content-Length bytes still to come; -1: chunked, unfinished
        self.body_read = 0  # body bytes so far
        self.chunks: Any = None  # decoder of a chunked body
        self.send_continue = head.expects
        self.must_close = not head.keep_alive
        self.unannounced = False  # the connection ends after this response, and its head does not say so
        self.started = False  # response bytes have been written
        self.answered = False  # the response is complete
        self.gone = False  # the client went away, or was sent away
        self.task: asyncio.Task[None] | None = None

    # The connection's side

    def scope(self, head: Head, client: Any, server: Any) -> dict[str, Any]:
        """ASGI's scope of this request; `client` and `server` are (host, port)."""
        return {
            "type": "http",
            "http_version": head.version,
            "asgi": _ASGI,
            "method": head.method,
            "scheme": "http",
            "path": head.path,
            "raw_path": head.raw_path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            "client": client,
            "server": server,
            "state": {},
            "extensions": {"gateway.exchange": self},
        }

    async def run(self, conversation: Awaitable[None]) -> None:
        """Let the application answer; the connection goes on, or ends, when it returns."""
        try:
            await conversation
        except Exception as error:  # the border to the application: nothing of it may end the connection unanswered
            logger.opt(exception=error).error("server_application_failed")
        finally:
            self.task = None
            self._callback = None
            self._connection.exchange_ended(self)

    def take_body(self, data: bytes) -> None:
        """Body bytes have come."""
        self._pieces.append(data)
        self._size += len(data)
        self.body_read += len(data)
        if self._size > BODY_BUFFER_BYTES:
            self._connection.pause()
        self.wake()

    def lose(self) -> None:
        """The client went away: tell the application in every way that it may be listening."""
        if self.gone:
            return
        self.gone = True
        self.wake()
        callback, self._callback = self._callback, None
        if callback is not None and not self.answered:
            callback()

    def wake(self) -> None:
        """Let `receive` look again."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # The application's side

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` once when the client goes away before its answer is complete; None takes it back.

        It replaces a task that waits in `receive`. If the client has gone already, the callback runs at the loop's
        next turn.
        """
        if callback is not None and self.gone:
            asyncio.get_running_loop().call_soon(callback)
        else:
            self._callback = callback

    def close_after(self) -> None:
        """End the connection after this response.

        Where the head has not announced it the end follows the last byte at once: a client that keeps connections must
        not find this one open and send its next request into the reset.
        """
        self.must_close = True
        self.unannounced = self._status != 0

    def whole_body(self) -> bytes | None:
        """The body if all of it is here and nobody has taken any; as `receive`, it can be taken once."""
        if self.body_left or self.gone or self.answered or self._size < 0 or self._size != self.body_read:
            return None
        body = self._taken()
        self._size = -1
        self._connection.resume()  # else nobody would see the client leave
        return body

    def _taken(self) -> bytes:
        pieces = self._pieces
        self._pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def receive(self) -> dict[str, Any]:
        """ASGI's receive: what has come of the body, then `http.disconnect` when nobody reads the answer."""
        while True:
            if self.gone or self.answered:
                return {"type": "http.disconnect"}
            if self._pieces or (self.body_left == 0 and self._size >= 0):
                body = self._taken()
                more = self.body_left != 0
                self._size = 0 if more else -1  # -1: the application has had the last of it
                self._connection.resume()
                return {"type": "http.request", "body": body, "more_body": more}
            if self.send_continue:
                self.send_continue = False
                if not self.started:
                    self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self._waiter is not None:
                raise RuntimeError("receive() is already being awaited")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def send(self, message: Any) -> None:
        """ASGI's send. Waits while the client reads more slowly than the application writes.

        After the client has gone it does nothing, as stock Hypercorn. Raises `ValueError` for headers that could
        split the response and `RuntimeError` for messages out of order or beyond Content-Length.
        """
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.body":
            more = message.get("more_body", False)
            if not self._write(bytes(message.get("body", b"")), more) and more:
                await self._connection.drained()
        elif kind == "http.response.start":
            self._begin(int(message["status"]), message.get("headers", ()))
        else:
            raise RuntimeError(f"unknown message {kind!r}")

    # The same without messages and waiting, and with headers that are lines already (`name: value\r\n`, well-formed,
    # none of them about framing or the connection). `scope["extensions"]["gateway.exchange"]` is this object.

    def begin(self, status: int, lines: bytes, length: int | None = None) -> None:
        """Start a response of `length` bytes, None: not known. Nothing is written before the first of them."""
        if self.gone:
            return
        if self._status:
            raise RuntimeError("a response has begun already")
        self._status = status
        told = b"" if length is None else b"content-length: %d\r\n" % length
        self._head = b"%b%b%b%b%b\r\n" % (status_line(status), date_line(), lines, told, self._framing(status, length))

    def respond(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole response."""
        if self.gone:
            return
        self.begin(status, lines, len(body))
        if self._left is None:  # no body may follow
            self._write(b"", False)
            return
        head, self._head, self._left = self._head or b"", None, 0
        self.started = self.answered = True
        self._connection.transport.write(head + body)
        self.wake()

    def push(self, data: bytes) -> bool:
        """Send a part of the body. False while the client reads more slowly: wait for `drained` before the next."""
        if self.gone:
            return True
        if self._chunked and self._head is None and data and not self.answered:  # as `_write`, in one step
            connection = self._connection
            connection.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return not connection.stalled
        return self._write(data, True)

    async def drained(self) -> None:
        """Return when the client has read most of what was written, or has gone."""
        if not self.gone and self._connection.stalled:
            await self._connection.drained()

    def _begin(self, status: int, headers: Any) -> None:
        if self._status:
            raise RuntimeError("http.response.start twice")
        self._head = self._rendered(status, headers)

    def _write(self, data: bytes, more: bool) -> bool:
        """Write a part of the body, or its end; whether the client keeps up."""
        if self.answered or not self._status:
            raise RuntimeError("http.response.body without a running response")
        out = self._framed(data, more)
        if out:
            self.started = True
            self._connection.write(out)
        if not more:
            if self._left:
                raise RuntimeError("the response's body is shorter than its content-length")
            self.answered = True
            self.wake()
            if self.unannounced:
                self._connection.finish()
        return not self._connection.stalled

    def _framed(self, data: bytes, more: bool) -> bytes:
        """`data` as it stands on the wire, with the head before it if that is still here."""
        head, self._head = self._head, None
        if self.method == "HEAD" or self._status in (204, 304):
            return head or b""
        if self._chunked:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if not more:
                data += b"0\r\n\r\n"
        elif self._left is not None:
            if len(data) > self._left:
                self._head = head
                raise RuntimeError("the response's body is longer than its content-length")
            self._left -= len(data)
        return data if head is None else head + data

    def _rendered(self, status: int, headers: Any) -> bytes:
        """The response's head as bytes. Framing and connection fields are ours; others pass if they are well-formed."""
        if not 200 <= status <= 999:
            raise ValueError(f"{status} is no final status")
        length: int | None = None
        parts = [status_line(status), date_line()]
        lines = 2
        for name, value in headers:
            start = _names.get(name)
            if start is None:
                start = _well_formed(name)
            if start:
                parts += (start, value, b"\r\n")
                lines += 1
                continue
            field = name.lower()  # framing is ours to say
            if field == b"content-length" and status == 204:
                continue  # it may not have one (RFC 9110, 8.6)
            if field == b"content-length":
                if length is not None or not value.isdigit():
                    raise ValueError("content-length must be one number")
                length = int(value)
                parts.append(b"content-length: %b\r\n" % value)
                lines += 1
            elif field == b"connection" and b"close" in value.lower():
                self.must_close = True
        head = b"".join(parts)
        if head.count(b"\n") != lines or head.count(b"\r") != lines or b"\0" in head:
            raise ValueError("a response header holds a line break or NUL")
        framing = self._framing(status, length)
        self._status = status
        return head + framing + b"\r\n"

    def _framing(self, status: int, length: int | None) -> bytes:
        """Decide how the response's end, and the connection's, is told; the lines that say so."""
        told = b""
        if not self._connection.can_go_on(self):
            self.must_close = True
        if self.method != "HEAD" and status not in (204, 304):
            if length is not None:
                self._left = length
            elif self.version == "1.1":
                self._chunked = True
                told = b"transfer-encoding: chunked\r\n"
            else:
                self.must_close = True  # HTTP/1.0 without a length: the end of the connection is the end of the body
        if self.must_close:
            told += b"connection: close\r\n"
        elif self.version == "1.0":
            told += b"connection: keep-alive\r\n"
        return told

    @property
    def cut(self) -> bool:
        """Whether a response has begun on the wire and is not complete."""
        return self.started and not self.answered

    @property
    def framed(self) -> bool:
        """Whether the client can see by itself that a cut response is not whole."""
        return self._chunked or self._left is not None


_FRAMING = frozenset((b"content-length", b"connection", b"transfer-encoding", b"keep-alive", b"upgrade"))
