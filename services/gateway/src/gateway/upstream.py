"""The way to the engines: the only file that knows aiohttp.

Raw bytes in both directions: no decompression, no cookies, no redirects, no total timeout (silence is judged by
`stages/forward.py`). What aiohttp raises becomes one of the two exceptions below, told apart by whether the engine can
have begun to work.
"""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

from gateway.errors import UpstreamError


class ConnectError(UpstreamError):
    """No connection, or an idle one that the engine had closed already: nothing was worked on."""


class BrokenConnection(UpstreamError):
    """The connection broke after the request was sent."""


class Exchange:
    """One request at an engine: status, headers, then the body in pieces as they come."""

    __slots__ = ("_response", "content_type", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("content-type", "application/octet-stream")

    async def read(self) -> bytes:
        """The bytes that have arrived; waits for at least one; b"" at the proper end. Raises `BrokenConnection`."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off while it was answering.") from error

    def close(self) -> None:
        """End the exchange. Before the proper end this closes the connection, which makes the engine stop working."""
        self._response.close()

    def release(self) -> None:
        """Give the connection back after the proper end."""
        self._response.release()


class Upstream:
    """Connections to all engines, kept alive for less long than vLLM keeps them (5 s)."""

    def __init__(self, connect_seconds: float, connections: int = 0) -> None:
        self._connector = aiohttp.TCPConnector(
            limit=connections,  # 0: bounded by ENGINE_CONCURRENCY, not twice
            keepalive_timeout=4.0,  # vLLM closes idle connections after 5 s; a race costs a retry
            ttl_dns_cache=10,
        )
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds, sock_read=None),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            requote_redirect_url=False,
        )

    async def open(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> Exchange:
        """Send a request and wait for the head of the answer. Raises `ConnectError` or `BrokenConnection`."""
        try:
            response = await self._session.request(method, url, headers=headers, data=body, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectError("The engine cannot be reached.") from error
        except aiohttp.ServerDisconnectedError as error:
            raise BrokenConnection("The engine closed the connection before it answered.") from error
        except (aiohttp.ClientError, ConnectionError, OSError) as error:
            raise BrokenConnection("The engine broke off before it answered.") from error
        return Exchange(response)

    async def get(
        self, url: str, headers: Mapping[str, str], seconds: float, limit: int = 4_194_304
    ) -> tuple[int, bytes]:
        """A small GET (health, models, metrics): status and at most `limit` bytes, within `seconds`.

        Raises `UpstreamError` for everything that goes wrong.
        """
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
                return response.status, await response.content.read(limit)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamError(f"{type(error).__name__} at {url.partition('?')[0]}") from error

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()
