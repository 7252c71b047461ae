"""Counts calls inside vLLM's API server: an ASGI middleware of the standard library alone.

vLLM's own gauges stay at 0 while its engine hangs, because the engine's loop publishes them. The API server knows
better: which calls are in, how long their prompts are, whether bytes of answers leave. The supervisor asks for that at
`/engine/progress` with a token of its own; for everyone else that path does not exist. What the supervisor's own calls
(canaries, warm-up) cost is counted on vLLM's page as `engine_own_tokens_total`, so that a ledger can tell them from
callers' tokens. A copy of this file is put on vLLM's PYTHONPATH under the name `engine_progress`, and nothing else of
ours.
"""

from __future__ import annotations

import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

try:
    from prometheus_client import Counter
except ImportError:  # vLLM brings it; without it nobody reads the page either
    Counter = None

PATH = "/engine/progress"
MOST_ANSWER_BYTES = 1_048_576
HEADER = b"x-engine-token"


class _Call:
    __slots__ = ("body_bytes", "chunks", "started")

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.body_bytes = 0
        self.chunks = 0


class Progress:
    """The middleware. Costs a dictionary entry a call and an increment a chunk."""

    _own_tokens: Any = None  # one a process

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._token = os.environ.get("ENGINE_PROGRESS_TOKEN", "").encode()
        self._calls: set[_Call] = set()
        if Progress._own_tokens is None and Counter is not None:
            Progress._own_tokens = Counter(
                "engine_own_tokens", "Tokens of the supervisor's own calls, which vLLM counts among all others."
            )
        self._chunks = 0  # pieces of answers sent, since the start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a call on and watch it, or answer the supervisor."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ours = self._is_supervisor(scope)
        if ours and scope["path"] == PATH:
            await self._answer(send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if ours:  # the canary must not look like the traffic it is measured against
            await self._own_call(scope, receive, send)
            return
        call = _Call()

        async def counted_receive() -> MutableMapping[str, Any]:
            message = await receive()
            if message["type"] == "http.request":
                call.body_bytes += len(message.get("body", b""))
            return message

        async def counted_send(message: MutableMapping[str, Any]) -> None:
            await send(message)
            if message["type"] == "http.response.body" and message.get("body"):
                call.chunks += 1
                self._chunks += 1

        self._calls.add(call)
        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            self._calls.discard(call)

    async def _own_call(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = bytearray()

        async def read(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.body" and len(answer) < MOST_ANSWER_BYTES:
                answer.extend(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, read)
        if self._own_tokens is not None:
            try:
                self._own_tokens.inc(json.loads(answer)["usage"]["total_tokens"])
            except (ValueError, KeyError, TypeError):
                return  # an error answer: nothing was computed

    def _is_supervisor(self, scope: Scope) -> bool:
        return bool(self._token) and any(
            name == HEADER and hmac.compare_digest(value, self._token) for name, value in scope["headers"]
        )

    def state(self) -> dict[str, float]:
        """Calls inside, those still silent, the longest silent prompt in bytes, the oldest one's age, chunks so far."""
        silent = [call for call in self._calls if call.chunks == 0]
        now = time.monotonic()
        return {
            "calls": len(self._calls),
            "silent_calls": len(silent),
            "longest_silent_bytes": max((call.body_bytes for call in silent), default=0),
            "oldest_seconds": max((now - call.started for call in self._calls), default=0.0),
            "chunks": self._chunks,
        }

    async def _answer(self, send: Send) -> None:
        body = json.dumps(self.state()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
