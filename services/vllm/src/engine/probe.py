"""What the supervisor asks vLLM over HTTP: health, progress, counters, the canary, the warm-up."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import aiohttp

from engine.progress import HEADER, PATH
from engine.watchdog import Reading

_LOOK = aiohttp.ClientTimeout(total=2)
# The counters that move when the engine does work; the last one is a histogram's count.
_COUNTERS = ("vllm:prompt_tokens_total{", "vllm:generation_tokens_total{", "vllm:iteration_tokens_total_count{")
_WARM_UP = "The quick brown fox jumps over the lazy dog while the engine measures how fast it reads. "


class Canary(StrEnum):
    """How a canary ended."""

    BACK = "back"
    UNSUPPORTED = "unsupported"  # the model cannot generate or embed
    LOST = "lost"  # refused or broken; silence goes on


@dataclass(frozen=True)
class WarmUp:
    """What the first requests showed."""

    prefill_rate: float  # tokens a second
    longest_tokens: int  # the model's context


class Probe:
    """A client of one vLLM. Open it as an async context manager."""

    def __init__(self, host: str, port: int, api_key: str | None, token: str, model: str) -> None:
        reach = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  # compared, not bound
        self._url = f"http://{reach}:{port}"
        self._headers = {HEADER.decode(): token}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._model = model
        self._kind = "completions"
        self._chunks = -1.0
        self._counters: tuple[float, ...] = ()

    async def __aenter__(self) -> Self:
        """Open the connections: few, and never shared with callers."""
        connector = aiohttp.TCPConnector(limit=8, keepalive_timeout=2)  # vLLM closes idle ones after 5 s
        self._session = aiohttp.ClientSession(headers=self._headers, connector=connector)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._session.close()

    async def health(self) -> int | None:
        """The status of `/health`: 200, 503 when the API server knows that its engine died, None without an answer."""
        try:
            async with self._session.get(f"{self._url}/health", timeout=_LOOK) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def look(self) -> Reading | None:
        """One reading, or None when the API server does not answer."""
        try:
            async with self._session.get(f"{self._url}{PATH}", timeout=_LOOK) as answer:
                if answer.status != 200:
                    return None
                state: dict[str, Any] = await answer.json()
            # vLLM's page of metrics is long: read only when calls are inside and no byte of an answer has left.
            if state["calls"] and state["chunks"] == self._chunks:
                self._counters = await self._count()
            self._chunks = state["chunks"]
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError):
            return None
        return Reading(int(state["calls"]), int(state["longest_silent_bytes"]), (self._chunks, *self._counters))

    async def _count(self) -> tuple[float, ...]:
        async with self._session.get(f"{self._url}/metrics", timeout=_LOOK) as answer:
            text = await answer.text()
        sums = dict.fromkeys(_COUNTERS, 0.0)
        for line in text.splitlines():
            for name in _COUNTERS:
                if line.startswith(name):
                    sums[name] += float(line.rpartition(" ")[2])
        return tuple(sums.values())

    async def canary(self, seconds: float) -> Canary:
        """One token, or one embedding, within `seconds`."""
        try:
            status, _ = await self._ask("x", seconds)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return Canary.LOST
        if status == 200:
            return Canary.BACK
        return Canary.UNSUPPORTED if status in (400, 404, 405, 501) else Canary.LOST

    async def warm_up(self, seconds: float) -> WarmUp | None:
        """Run the shapes that callers will use, find out what kind of model this is, and measure its prefill.

        None when the model answers neither completions nor embeddings. Raises what aiohttp raises, and `TimeoutError`.
        """
        longest = await self._longest_tokens()
        for self._kind in ("completions", "embeddings"):
            status, _ = await self._ask("x", seconds)
            if status == 200:
                break
        else:
            return None
        words = max(1, min(24, longest // 40))
        rate = 0.0
        for attempt in range(2):  # the first pays for compilation; another beginning, or the prefix cache would answer
            started = time.monotonic()
            status, tokens = await self._ask(f"{attempt} {_WARM_UP * words}", seconds)
            if status == 200 and tokens:
                rate = tokens / max(time.monotonic() - started, 1e-3)
        return WarmUp(rate, longest)

    async def _ask(self, prompt: str, seconds: float) -> tuple[int, int]:
        """Status and prompt tokens of the smallest call."""
        if self._kind == "completions":
            body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        else:
            body = {"model": self._model, "input": prompt}
        async with asyncio.timeout(seconds):
            async with self._session.post(
                f"{self._url}/v1/{self._kind}", json=body, timeout=aiohttp.ClientTimeout(total=None)
            ) as answer:
                if answer.status != 200:
                    await answer.read()
                    return answer.status, 0
                usage = (await answer.json()).get("usage") or {}
                return 200, int(usage.get("prompt_tokens") or 0)

    async def _longest_tokens(self) -> int:
        async with self._session.get(f"{self._url}/v1/models", timeout=_LOOK) as answer:
            models = (await answer.json()).get("data") or [{}]
            return int(models[0].get("max_model_len") or 8192)
