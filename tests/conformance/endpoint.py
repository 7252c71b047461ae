"""The endpoint under test, over HTTP and over a raw socket, and what a stream from it looked like."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp


class Failed(Exception):
    """A check that did not find what it expects."""


class Skipped(Exception):
    """A check that does not apply to this endpoint."""


def expect(condition: object, message: str) -> None:
    """Fail the check with `message` unless `condition`."""
    if not condition:
        raise Failed(message)


@dataclass
class Whole:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; fails the check if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Failed(f"status {self.status}, body is not JSON: {self.body[:80]!r}") from None


@dataclass
class Event:
    """One server-sent event: its name (empty if it has none), its data, and when it arrived."""

    name: str
    data: str
    at: float

    @property
    def json(self) -> Any:
        """The data as JSON; fails the check if it is none."""
        try:
            return json.loads(self.data)
        except ValueError:
            raise Failed(f"an event is not JSON: {self.data[:80]!r}") from None


@dataclass
class Stream:
    """An event stream as it was received. `clean`: the HTTP body ended properly."""

    status: int
    headers: dict[str, str]
    raw: bytes = b""
    events: list[Event] = field(default_factory=list)
    clean: bool = False
    seconds: float = 0.0

    def chunks(self) -> list[Any]:
        """Chat and completions: the data of all events but `[DONE]`, as JSON."""
        return [event.json for event in self.events if event.data != "[DONE]"]


class Endpoint:
    """`url` with or without `/v1` at its end."""

    def __init__(self, url: str, key: str | None, model: str, seconds: float, verify: bool) -> None:
        self.base = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self.model = model
        self.seconds = seconds
        self.ssl: ssl.SSLContext | bool = True
        if not verify:
            self.ssl = ssl.create_default_context()
            self.ssl.check_hostname = False
            self.ssl.verify_mode = ssl.CERT_NONE
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Endpoint:
        timeout = aiohttp.ClientTimeout(total=self.seconds)
        connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def headers(self, key: str | None = "") -> dict[str, str]:
        """Headers with the key, another one, or none (None)."""
        key = self.key if key == "" else key
        return {"authorization": f"Bearer {key}"} if key else {}

    async def ask(
        self, path: str, body: Any = None, *, method: str | None = None, key: str | None = "", **headers: str
    ) -> Whole:
        """One request; `body` as JSON, or bytes as they are."""
        assert self._session is not None
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = self.headers(key) | ({"content-type": "application/json"} if data is not None else {})
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        verb = method or ("GET" if data is None else "POST")
        async with self._session.request(verb, self.base + path, data=data, headers=sent, ssl=self.ssl) as answer:
            return Whole(answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read())

    async def stream(self, path: str, body: dict[str, Any]) -> Stream:
        """One streamed request, read to its end, however it ends."""
        assert self._session is not None
        sent = self.headers() | {"content-type": "application/json"}
        began = time.monotonic()
        async with self._session.post(self.base + path, json=body, headers=sent, ssl=self.ssl) as answer:
            stream = Stream(answer.status, {k.lower(): v for k, v in answer.headers.items()})
            pending = b""
            with contextlib.suppress(aiohttp.ClientPayloadError, ConnectionError):
                async for piece in answer.content.iter_any():
                    stream.raw += piece
                    pending += piece
                    *whole, pending = pending.split(b"\n\n")
                    stream.events += [e for block in whole if (e := parse(block, time.monotonic() - began))]
                stream.clean = True
        stream.seconds = time.monotonic() - began
        if stream.status == 200 and pending.strip() and stream.clean:
            raise Failed(f"the body ends inside an event: {pending[-60:]!r}")
        return stream

    async def raw(self, request: bytes, seconds: float = 5.0) -> bytes:
        """Bytes as they are on a connection of their own; what came back until the end, or within `seconds`."""
        parts = urlsplit(self.base)
        secure = parts.scheme == "https"
        context: Any = (self.ssl if isinstance(self.ssl, ssl.SSLContext) else True) if secure else None
        port = parts.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
        answer = b""
        try:
            writer.write(request)
            await writer.drain()
            async with asyncio.timeout(seconds):
                while part := await reader.read(65536):
                    answer += part
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()
        return answer

    @property
    def host(self) -> str:
        """For the Host header of raw requests."""
        return urlsplit(self.base).netloc


def parse(block: bytes, at: float) -> Event | None:
    """One event from its lines; None for a comment. Fails the check for anything that is no event."""
    try:
        lines = block.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise Failed(f"an event is not UTF-8: {block[:60]!r}") from None
    name, data = "", []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif line.startswith("event:"):
            name = line[6:].strip()
        elif line and not line.startswith((":", "id:", "retry:")):
            raise Failed(f"a line that is no field of an event: {line[:60]!r}")
    return Event(name, "\n".join(data), at) if data else None
