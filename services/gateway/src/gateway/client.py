"""The caller's side of one call as raw ASGI: head, bounded body, answer, and the news that it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from gateway.errors import ClientGone, InvalidRequest, RequestTooLarge

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
_LARGE_BYTES = 2_097_152  # joining more than this takes a millisecond


class Headers(dict[bytes, bytes]):
    """Request headers: lower-case names; of a header that stands twice the first counts."""

    __slots__ = ()

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__(reversed([*raw]))

    def text(self, name: bytes) -> str:
        """The value as text, empty if missing."""
        return self.get(name, b"").decode("latin-1")


class Client:
    """One request and its answer. Sending is a matter of one task at a time; `started` says whether a head is out.

    `exchange` is our own connection protocol's side of the request, which does without messages and waiting where it
    can.
    An answer's headers are lines (`name: value\\r\\n`).
    """

    __slots__ = ("_exchange", "_receive", "_send", "_unsent", "_watcher", "gone", "headers", "started")

    def __init__(self, headers: Headers, receive: Receive, send: Send, exchange: Any = None) -> None:
        self._receive = receive
        self._send = send
        self._watcher: asyncio.Task[None] | None = None
        self._unsent: list[bytes] = []
        self._exchange = exchange
        self.headers = headers
        self.started = False
        self.gone = False

    @property
    def guarded(self) -> bool:
        """Whether the server itself ends bodies that do not arrive in time, as our connection protocol does."""
        return self._exchange is not None

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises `RequestTooLarge` above `limit` bytes and `ClientGone` when it breaks off."""
        too_large = f"The body is larger than the limit of {limit} bytes."
        if self._exchange is not None and (whole := self._exchange.whole_body()) is not None:
            if len(whole) > limit:
                raise RequestTooLarge(too_large)
            return whole  # type: ignore[no-any-return]
        length = self.headers.get(b"content-length")
        if length is not None:
            if not length.isdigit():
                raise InvalidRequest("Content-Length is not a number.")
            if int(length) > limit:
                raise RequestTooLarge(too_large)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientGone("The client closed the connection while it was sending.")
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise RequestTooLarge(too_large)
            parts.append(part)
            if not message.get("more_body", False):
                if size > _LARGE_BYTES:
                    return await asyncio.to_thread(b"".join, parts)  # for so much it gives Python's lock back
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` once the client has gone. Only after the body is read.

        Our own connection protocol offers a registration; elsewhere one task waits for the disconnect.
        """
        if self._exchange is not None:
            self._exchange.on_disconnect(on_gone)
        else:
            self._watcher = asyncio.create_task(self._watch(on_gone))

    async def _watch(self, on_gone: Callable[[], None]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        on_gone()

    def close_after(self) -> None:
        """End the connection after this answer, where the server can."""
        if self._exchange is not None:
            self._exchange.close_after()

    def unwatch(self) -> None:
        """Stop watching; idempotent."""
        if self._exchange is not None:
            self._exchange.on_disconnect(None)
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    async def start(self, status: int, lines: bytes, length: int | None = None) -> None:
        """Send the head of an answer of `length` bytes, None: not known."""
        self.started = True
        if self._exchange is not None:
            self._exchange.begin(status, lines, length)
            return
        headers = [tuple(line.split(b": ", 1)) for line in lines.split(b"\r\n")[:-1]]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def respond(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer."""
        if self._exchange is not None:
            self.started = True
            self._exchange.respond(status, lines, body)
        else:
            await self.start(status, lines, len(body))
            await self._send({"type": "http.response.body", "body": body, "more_body": False})

    @property
    def push(self) -> Callable[[bytes], bool]:
        """Sends a part of the body without waiting; False: do not send more before `drained`. Keep it for many."""
        return self._put_aside if self._exchange is None else self._exchange.push

    def _put_aside(self, data: bytes) -> bool:
        self._unsent.append(data)
        return False

    async def drained(self) -> None:
        """Wait until the client has read most of what was pushed, or has gone."""
        if self._exchange is not None:
            await self._exchange.drained()
        while self._unsent:
            await self._send({"type": "http.response.body", "body": self._unsent.pop(0), "more_body": True})

    async def write(self, data: bytes) -> None:
        """Send a part of the body; waits while the client reads slower than we write."""
        if not self.push(data):
            await self.drained()

    async def end(self, data: bytes = b"") -> None:
        """Send the last part of the body."""
        if self._unsent:
            await self.drained()
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
