"""How long a prompt is, asked of the engine that has the tokenizer.

A prompt's bound by its bytes is several times its tokens. That is good enough while a day's quota is wide, and wrong
at its end: a call would be refused, or its answer cut, that fits. Then the engine's `/tokenize` is asked for the exact
number. Once for each engine it also tells what the chat template adds by itself. Engines without the route are bounded
by bytes and a small allowance.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from loguru import logger

from gateway.backends import TEMPLATE_TOKENS
from gateway.errors import GatewayError
from gateway.wire import NOT_PROMPT

if TYPE_CHECKING:
    from gateway.backends import Backend, Registry
    from gateway.call import Call
    from gateway.large_body import Buffer
    from gateway.upstream import Upstream

COUNT_SECONDS = 2.0
COUNT_BYTES = 8 * 1024 * 1024  # the answer lists every token's number

# Fields that /tokenize understands as the chat route does, and those that never reach the prompt. With any other field
# the count could be another one than the call's.
_CHAT = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class _Count(msgspec.Struct):
    count: int


_count = msgspec.json.Decoder(_Count)


class PromptCounter:
    """Asks engines. Every method gives None where the engine does not say, and never raises for its failures."""

    def __init__(self, upstream: Upstream, registry: Registry) -> None:
        self._upstream = upstream
        self._registry = registry

    async def template(self, backend: Backend, model: str) -> int | None:
        """What the chat template of `model` adds to one short message, in tokens; None: nobody could be asked."""
        letter = {"model": model, "messages": [{"role": "user", "content": "x"}]}
        status, count = await self._ask(backend, msgspec.json.encode(letter))
        if count is not None:
            return max(0, count - 1)
        if not status:
            return None
        logger.bind(backend=backend.name, status=status).warning("template_not_counted")  # quotas keep a wider margin
        return TEMPLATE_TOKENS

    async def count(self, call: Call) -> int | None:
        """The exact prompt of `call` in tokens, if an engine can tell."""
        request = call.request
        if request is None or request.media:
            return None
        if request.endpoint.name == "chat_completions" and "messages" in request.fields:
            names: tuple[str, ...] = _CHAT
        elif (
            request.endpoint.name == "completions" and bytes(memoryview(request.fields.get("prompt", b"")))[:1] == b'"'
        ):
            names = ("prompt", "add_special_tokens")
        else:
            return None
        if any(name not in names and name not in NOT_PROMPT for name in request.fields):
            return None
        now = self._registry.clock()
        for backend in self._registry.pool(request.model):
            if backend.available(now):
                fields = {name: request.fields[name] for name in names if name in request.fields}
                fields["model"] = msgspec.Raw(msgspec.json.encode(self._registry.served_name(backend, request.model)))
                body = msgspec.json.encode(fields)
                whole = body if request.aside is None else request.aside.restore(body)
                return (await self._ask(backend, whole))[1]
        return None

    async def _ask(self, backend: Backend, body: bytes | list[Buffer]) -> tuple[int, int | None]:
        """The status (0: no answer) and the count."""
        headers = {"content-type": "application/json"}
        if backend.api_key:
            headers["authorization"] = f"Bearer {backend.api_key}"
        exchange = None
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                route = self._upstream.route("POST", f"{backend.url}/tokenize", headers)
                exchange = await self._upstream.open(route, {}, body)
                said = bytearray()
                while len(said) < COUNT_BYTES and (part := await exchange.read()):
                    said += part
            return exchange.status, _count.decode(said).count if exchange.status == 200 else None
        except (GatewayError, TimeoutError):
            return 0, None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return 200, None
        finally:
            if exchange is not None:
                exchange.close()
