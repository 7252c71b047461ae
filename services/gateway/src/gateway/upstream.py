"""The way to the engines: with `names`, the only file that knows aiohttp.

Raw bytes in both directions: no decompression, no cookies, no redirects, no total timeout (silence is judged by
`stages/forward.py`). What aiohttp raises becomes one of the two exceptions below, told apart by whether the engine can
have begun to work.

Calls take aiohttp's connector and its connections, but not its session, whose general path (URL and header objects,
cookies, auto headers, middleware, writer tasks, stream queues) costs more than the rest of a call: link.py reads and
writes instead, and idle connections wait here. What that relies on is not promised by aiohttp: it is used with the
versions in `LEAN_VERSIONS` only, a test fails when another one is installed, and with another one the session takes its
place (said in the log).
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import yarl
from loguru import logger

from gateway.errors import UpstreamError
from gateway.link import BrokenConnection, ConnectError, Link
from gateway.names import PatientResolver

if TYPE_CHECKING:
    from gateway.large_body import Buffer

__all__ = ["BrokenConnection", "ConnectError", "Exchange", "Route", "Upstream"]

LEAN_VERSIONS = ("3.14.5",)
LARGE_BYTES = 65_536  # aiohttp warns of bytes larger than its buffer
IDLE_SECONDS = 4.0  # vLLM closes idle connections after 5 s; a race costs a retry
SWEEP_SECONDS = 2.0


class Route:
    """One path of one engine: what is the same in every request to it."""

    __slots__ = ("headers", "method", "pool", "start", "target", "url")

    def __init__(self, method: str, url: str, headers: Mapping[str, str], target: Any, pool: list[Link]) -> None:
        self.method = method
        self.url = url
        self.headers = dict(headers)
        self.target = target  # as aiohttp's connector wants it
        self.pool = pool  # idle connections to the engine
        parts = target.url
        fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        self.start = f"{method} {parts.raw_path_qs} HTTP/1.1\r\nhost: {parts.host_port_subcomponent}\r\n{fields}"
        if self.start.count("\n") != 2 + len(self.headers):
            raise ValueError("a request header holds a line break")


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

    async def relay(self, take: Callable[[bytes], bool]) -> None:
        """Give `take` every piece when it arrives, b"" at the proper end, until it returns True. Raises what it raises,
        and `BrokenConnection`. What comes when nobody takes it waits, and in the end the engine with it."""
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

    async def relay(self, take: Callable[[bytes], bool]) -> None:
        while not take(await self.read()):
            pass

    def close(self) -> None:
        self._response.close()

    def release(self) -> None:
        self._response.release()


class Upstream:
    """Connections to all engines, kept alive for less long than vLLM keeps them (5 s)."""

    def __init__(self, connect_seconds: float, connections: int = 0) -> None:
        self._names = PatientResolver()
        self._connector = aiohttp.TCPConnector(
            limit=connections,  # 0: bounded by ENGINE_CONCURRENCY, not twice
            keepalive_timeout=IDLE_SECONDS,
            ttl_dns_cache=10,
            resolver=self._names,
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
        self._pools: dict[tuple[str, str | None, int | None], list[Link]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self.lean = aiohttp.__version__ in LEAN_VERSIONS
        if not self.lean:
            logger.bind(aiohttp=aiohttp.__version__).warning("upstream_session_path")

    def route(self, method: str, url: str, headers: Mapping[str, str]) -> Route:
        """Prepare requests to `url` that all have `headers`. Raises `ValueError` if these hold a line break."""
        parts = yarl.URL(url)
        pool = self._pools.setdefault((parts.scheme, parts.host, parts.port), [])
        return Route(method, url, headers, aiohttp.ClientRequest(method, parts, loop=asyncio.get_running_loop()), pool)

    async def open(self, route: Route, headers: Mapping[str, str], body: bytes | list[Buffer]) -> Exchange:
        """Send a request with `headers` beside the route's, and wait for the head of the answer.

        A large body may come in pieces.

        Raises `ConnectError` or `BrokenConnection`, and `ValueError` for a header that holds a line break.
        """
        try:
            if not self.lean:
                return await self._open_session(route, headers, body)
            fields = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
            if fields.count("\n") != len(headers) or fields.count("\r") != len(headers):
                raise ValueError("a request header holds a line break")
            link = self._idle(route.pool) if route.pool else None
            if link is None:
                link = await self._connect(route)
            size = len(body) if isinstance(body, bytes) else sum(map(len, body))
            answer = link.send(f"{route.start}{fields}content-length: {size}\r\n\r\n".encode("latin-1"), body)
            try:
                await answer.head()
            except BaseException:
                answer.close()
                raise
            return answer
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectError("The engine cannot be reached.") from error
        except aiohttp.ServerDisconnectedError as error:
            raise BrokenConnection("The engine closed the connection before it answered.") from error
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off before it answered.") from error

    async def _open_session(self, route: Route, headers: Mapping[str, str], body: bytes | list[Buffer]) -> Exchange:
        if isinstance(body, list):
            body = await asyncio.to_thread(b"".join, body)
        data = io.BytesIO(body) if len(body) > LARGE_BYTES else body or None
        return _SessionExchange(
            await self._session.request(
                route.method, route.url, headers={**route.headers, **headers}, data=data, allow_redirects=False
            )
        )

    async def _connect(self, route: Route) -> Link:
        try:
            connection = await self._connector.connect(route.target, [], self._timeout)
        except TimeoutError as error:
            raise ConnectError("The engine cannot be reached.") from error
        if self._sweeper is None:
            self._sweep()
        return Link(connection, asyncio.get_running_loop(), route.pool)

    def _idle(self, pool: list[Link]) -> Link | None:
        """The connection that was used last, if it is young enough for the engine to have it still."""
        link = pool.pop()
        if asyncio.get_running_loop().time() - link.idle_since <= IDLE_SECONDS:
            return link
        link.close()
        while pool:
            pool.pop().close()  # these are older
        return None

    def _sweep(self) -> None:
        """Close connections that have been idle for too long; again while there are any."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - IDLE_SECONDS
        for pool in self._pools.values():
            while pool and pool[0].idle_since < oldest:
                pool.pop(0).close()
        self._sweeper = loop.call_later(SWEEP_SECONDS, self._sweep)

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
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._session.close()
        await self._names.close()
