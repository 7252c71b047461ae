"""Many callers at once against a gateway, on one event loop: what each saw, and when."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Seen:
    """One call as its caller saw it. `error` is the code of an error, in the status or in the stream."""

    key: str
    status: int = 0
    error: str | None = None
    whole: bool = False
    events: int = 0
    retry_after: float | None = None
    request_id: str = ""
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # seconds
    ended: float = 0.0


class Crowd:
    """Callers with keys; `calls` has everything that happened, in the order in which it ended."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.session = session
        self.calls: list[Seen] = []

    async def call(self, key: str, directive: str, words: int = 10, request_id: str = "", **fields: Any) -> Seen:
        """One streamed chat; never raises for what the service does."""
        text = f"double:{directive} " + "word " * words
        body = {"model": "double", "stream": True, "messages": [{"role": "user", "content": text}], **fields}
        seen = Seen(key)
        headers = {"authorization": f"Bearer {key}", **({"x-request-id": request_id} if request_id else {})}
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", json=body, headers=headers) as answer:
                seen.status = answer.status
                seen.request_id = answer.headers.get("x-request-id", "")
                if "retry-after" in answer.headers:
                    seen.retry_after = float(answer.headers["retry-after"])
                if answer.status != 200:
                    seen.error = str((await answer.json())["error"]["code"])
                else:
                    await self._stream(seen, answer)
        except aiohttp.ClientError as error:
            seen.error = seen.error or type(error).__name__
        seen.ended = time.monotonic()
        self.calls.append(seen)
        return seen

    async def _stream(self, seen: Seen, answer: aiohttp.ClientResponse) -> None:
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            seen.events += 1
            if seen.first_token is None and b'"content":"' in line and b'"content":""' not in line:
                seen.first_token = time.monotonic() - seen.began
            if line.startswith(b"data: [DONE]"):
                seen.whole = True
            elif line.startswith(b'data: {"error"'):
                seen.error = json.loads(line[6:])["error"]["code"]

    async def loop(self, key: str, directive: str, until: float, **fields: Any) -> None:
        """Call again and again until the loop's time is `until`."""
        while asyncio.get_running_loop().time() < until:
            await self.call(key, directive, **fields)

    def of(self, key: str) -> list[Seen]:
        """The calls of one key."""
        return [seen for seen in self.calls if seen.key == key]

    def counts(self) -> dict[tuple[int, str | None], int]:
        """How many calls ended how: (status, error)."""
        found: dict[tuple[int, str | None], int] = defaultdict(int)
        for seen in self.calls:
            found[seen.status, seen.error] += 1
        return dict(found)


@asynccontextmanager
async def crowd(url: str, seconds: float = 60.0) -> AsyncIterator[Crowd]:
    """Callers with as many connections as they like, a fresh one for each call: the gateway closes a connection on
    which a stream broke, and a call that meets the closing would tell about the client, not about the service."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), timeout=timeout
    ) as session:
        yield Crowd(url, session)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def jain(values: list[float]) -> float:
    """Jain's index: 1 when all are equal."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))
