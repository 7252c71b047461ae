"""The way to the engines: the only file that knows aiohttp.

Raw bytes in both directions: no decompression, no cookies, no redirects, no total timeout (silence is judged by
`stages/forward.py`). What aiohttp raises becomes one of the two exceptions below, told apart by whether the engine can
have begun to work.

Calls take aiohttp's connector, connections and parser, but not its session, whose general path (URL and header objects,
cookies, auto headers, middleware, writer tasks) costs more than the rest of a call. What that relies on is not promised
by aiohttp: it is used with the versions in `LEAN_VERSIONS` only, a test fails when another one is installed, and with
another one the session takes its place (said in the log).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import yarl
from loguru import logger

from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.large_body import Buffer

LEAN_VERSIONS = ("3.14.5",)
READ_BUFFER_BYTES = 65_536  # read ahead of a slow client at most twice this
_MOST_ROUTES = 1_024  # engines x paths; both come from the configuration


class ConnectError(UpstreamError):
    """No connection, or an idle one that the engine had closed already: nothing was worked on."""


class BrokenConnection(UpstreamError):
    """The connection broke after the request was sent."""


class Exchange(Protocol):
    """One request at an engine: status, headers, then the body in pieces as they come."""

    status: int
    content_type: str

    @property
    def whole(self) -> bool:
        """Whether nothing more will come."""
        ...

    async def read(self) -> bytes:
        """The bytes that have arrived; waits for at least one; b"" at the proper end. Raises `BrokenConnection`."""
        ...

    def close(self) -> None:
        """End the exchange. Before the proper end this closes the connection, which makes the engine stop working."""
        ...

    def release(self) -> None:
        """Give the connection back after the proper end."""
        ...


class _SessionExchange:
    """An exchange on aiohttp's session."""

    __slots__ = ("_response", "content_type", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("content-type", "application/octet-stream")

    @property
    def whole(self) -> bool:
        return self._response.content.at_eof()

    async def read(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off while it was answering.") from error

    def close(self) -> None:
        self._response.close()

    def release(self) -> None:
        self._response.release()


class _LeanExchange:
    """An exchange on a connection of aiohttp's connector."""

    __slots__ = ("_connection", "_content", "content_type", "status")

    def __init__(self, connection: Any, message: Any, content: Any) -> None:
        self._connection = connection
        self._content = content
        self.status: int = message.code
        self.content_type: str = message.headers.get("content-type", "application/octet-stream")

    @property
    def whole(self) -> bool:
        return bool(self._content.at_eof())

    async def read(self) -> bytes:
        try:
            data: bytes = await self._content.readany()
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off while it was answering.") from error
        return data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def release(self) -> None:
        if self._connection is not None:
            self._connection.release()  # closes it when the engine said so, or when more came than belongs here
            self._connection = None


class Upstream:
    """Connections to all engines, kept alive for less long than vLLM keeps them (5 s)."""

    def __init__(self, connect_seconds: float, connections: int = 0) -> None:
        self._connector = aiohttp.TCPConnector(
            limit=connections,  # 0: bounded by ENGINE_CONCURRENCY, not twice
            keepalive_timeout=4.0,  # vLLM closes idle connections after 5 s; a race costs a retry
            ttl_dns_cache=10,
        )
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=None)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=self._timeout,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            requote_redirect_url=False,
        )
        self._routes: dict[tuple[str, str], tuple[Any, str]] = {}
        self.lean = aiohttp.__version__ in LEAN_VERSIONS
        if not self.lean:
            logger.bind(aiohttp=aiohttp.__version__).warning("upstream_session_path")

    async def open(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | list[Buffer] | None
    ) -> Exchange:
        """Send a request and wait for the head of the answer. Raises `ConnectError` or `BrokenConnection`."""
        try:
            if self.lean:
                return await self._open_lean(method, url, headers, body or b"")
            if isinstance(body, list):
                body = await asyncio.to_thread(b"".join, body)
            data = io.BytesIO(body) if body and len(body) > READ_BUFFER_BYTES else body  # aiohttp warns of large bytes
            response = await self._session.request(method, url, headers=headers, data=data, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectError("The engine cannot be reached.") from error
        except aiohttp.ServerDisconnectedError as error:
            raise BrokenConnection("The engine closed the connection before it answered.") from error
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off before it answered.") from error
        return _SessionExchange(response)

    async def _open_lean(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | list[Buffer]
    ) -> _LeanExchange:
        route = self._routes.get((method, url))
        if route is None:
            route = self._add_route(method, url)
        target, start = route
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        size = len(body) if isinstance(body, bytes) else sum(map(len, body))
        head = f"{start}{''.join(lines)}content-length: {size}\r\n\r\n".encode("latin-1")
        if head.count(b"\n") != len(lines) + 4 or head.count(b"\r") != len(lines) + 4:
            raise ValueError("a request header holds a line break")
        try:
            connection = await self._connector.connect(target, [], self._timeout)
        except TimeoutError as error:
            raise ConnectError("The engine cannot be reached.") from error
        try:
            protocol: Any = connection.protocol
            protocol.set_response_params(read_until_eof=True, auto_decompress=False, read_bufsize=READ_BUFFER_BYTES)
            transport = protocol.transport
            if transport is None or transport.is_closing():
                raise ConnectError("The engine has closed the idle connection.")
            if isinstance(body, bytes) and size <= READ_BUFFER_BYTES:
                transport.write(head + body)
            else:
                transport.write(head)
                await _write(protocol, [body] if isinstance(body, bytes) else body)
            message, content = await protocol.read()
            while 100 <= message.code < 200:
                message, content = await protocol.read()
        except BaseException:
            connection.close()
            raise
        return _LeanExchange(connection, message, content)

    def _add_route(self, method: str, url: str) -> tuple[Any, str]:
        """The connection's target, as aiohttp's connector wants it, and the first lines of every request to it."""
        if len(self._routes) >= _MOST_ROUTES:
            self._routes.clear()
        parts = yarl.URL(url)
        target = aiohttp.ClientRequest(method, parts, loop=asyncio.get_running_loop())
        host = parts.host_port_subcomponent
        route = target, f"{method} {parts.raw_path_qs} HTTP/1.1\r\nhost: {host}\r\n"
        self._routes[method, url] = route
        return route

    async def get(
        self, url: str, headers: Mapping[str, str], seconds: float, limit: int = 4_194_304
    ) -> tuple[int, bytes]:
        """A small GET (health, models, metrics): status and body, within `seconds`.

        Raises `UpstreamError` for everything that goes wrong, also a body of more than `limit` bytes.
        """
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
                body = bytearray()
                async for part in response.content.iter_any():
                    body += part
                    if len(body) > limit:
                        raise UpstreamError(f"more than {limit} bytes at {url.partition('?')[0]}")
                return response.status, bytes(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamError(f"{type(error).__name__} at {url.partition('?')[0]}") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()


async def _write(protocol: Any, body: list[Buffer]) -> None:
    """Write a large body piece by piece, as fast as the engine takes it, so that none waits in a buffer whole."""
    transport = protocol.transport
    for part in body:
        view = memoryview(part)
        for start in range(0, len(view), READ_BUFFER_BYTES):
            transport.write(view[start : start + READ_BUFFER_BYTES])
            if protocol.writing_paused:
                await protocol._drain_helper()
                if transport.is_closing():
                    return  # what the engine said before it closed is still to be read
