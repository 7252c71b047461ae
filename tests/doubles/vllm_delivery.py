"""How the vLLM double puts an answer on the wire, with the faults that a directive asks for."""

from __future__ import annotations

import asyncio
import socket
import struct

from aiohttp import web

from tests.doubles.vllm_directive import Directive
from tests.doubles.vllm_engine import Record

FOREVER = 3600.0  # a hang lasts until the client leaves


_go = asyncio.Semaphore(0)


class Died(Exception):
    """The answer was ended on purpose; nothing more may be written. `response` is there if it ended properly."""

    def __init__(self, response: web.StreamResponse | None = None) -> None:
        super().__init__()
        self.response = response


def leaked(directive: Directive) -> dict[str, str]:
    """Headers of the engine that must not reach a caller."""
    if not directive.get("leak"):
        return {}
    return {"x-internal-worker": "tp0.engine.internal", "set-cookie": "engine=1", "x-request-id": "from-the-engine"}


async def hang() -> None:
    """Keep silent; ends only by cancellation."""
    await asyncio.sleep(FOREVER)


async def go_on(_: web.Request) -> web.Response:
    """`POST /double/go`: one stream that waits goes on, or the next one that would."""
    _go.release()
    return web.json_response({})


async def pause(told_ms: float | None, default_ms: float) -> None:
    """Wait as told, or the default."""
    if milliseconds := default_ms if told_ms is None else told_ms:
        await asyncio.sleep(milliseconds / 1000)


async def break_off(request: web.Request, how: str | None) -> None:
    """Close the connection by FIN (default) or RST, then raise `Died`."""
    transport = request.transport
    if transport is not None:
        if how == "rst":
            sock: socket.socket = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()
    raise Died


async def before_headers(request: web.Request, directive: Directive) -> None:
    """Faults that come instead of an answer."""
    if directive.says("hang", "headers"):
        await hang()
    if directive.says("die", "headers"):
        await break_off(request, directive.get("how"))
    if directive.says("garbage", "headers"):
        if request.transport is not None:
            request.transport.write(b"\x00\xffgarbage that is no HTTP\r\n\r\n")
        await break_off(request, "fin")


class Stream:
    """An event stream. Counts events; breaks, hangs, splits and joins as told."""

    def __init__(self, request: web.Request, record: Record, directive: Directive) -> None:
        self.request = request
        self.record = record
        self.directive = directive
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Server": "uvicorn", **leaked(directive)}
        self.response = web.StreamResponse(headers=headers)
        self._split = directive.count("split")
        self._coalesce = directive.count("coalesce") or 1
        self._held: list[bytes] = []
        if directive.get("close"):
            self.response.force_close()

    async def open(self) -> None:
        """Send the head."""
        await self.response.prepare(self.request)

    async def event(self, event: bytes) -> None:
        """Send one event, or the fault that stands before it."""
        directive = self.directive
        for key in ("die_after", "hang_after", "wait_after", "garbage_after"):
            if directive.count(key) == self.record.events:
                await self.flush()
                await self._fault(key)
        self.record.events += 1
        self._held.append(event)
        if len(self._held) >= self._coalesce:
            await self.flush()

    async def _fault(self, key: str) -> None:
        if key == "hang_after":
            await hang()
        if key == "wait_after":
            await _go.acquire()
            return
        if key == "garbage_after":
            await self.response.write(b"\x00\xff{]garbage that is no event\n")
            await self.close()
            raise Died(self.response)
        if self.directive.says("how", "clean"):
            await self.close()
            raise Died(self.response)
        await break_off(self.request, self.directive.get("how"))

    async def flush(self) -> None:
        """Write what is held back."""
        held, self._held = b"".join(self._held), []
        if not held:
            return
        if self._split is None:
            await self.response.write(held)
            return
        for start in range(0, len(held), self._split):
            await self.response.write(held[start : start + self._split])
            await asyncio.sleep(0)

    async def close(self) -> None:
        """End the body properly."""
        await self.flush()
        await self.response.write_eof()


async def whole(
    request: web.Request, record: Record, directive: Directive, body: bytes, content_type: str = "application/json"
) -> web.StreamResponse:
    """Send a whole body, or the faults that a body can have."""
    if directive.says("json", "broken"):
        body = body[: len(body) // 2]
    response = web.StreamResponse(headers={"Content-Type": content_type, "Server": "uvicorn", **leaked(directive)})
    response.content_length = len(body)
    if directive.get("close"):
        response.force_close()
    await response.prepare(request)
    record.events += 1
    for key in ("die_after", "hang_after"):
        limit = directive.count(key)
        if limit is not None:
            await response.write(body[:limit])
            if key == "hang_after":
                await hang()
            await break_off(request, directive.get("how"))
    split = directive.count("split") or len(body) or 1
    for start in range(0, len(body), split):
        await response.write(body[start : start + split])
    await response.write_eof()
    return response
