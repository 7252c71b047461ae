"""A vLLM 0.32 that needs no model: a real process with vLLM's API, exact counts, and faults on demand.

    python -m tests.doubles.vllm_server --port 0 --model double

prints one line `{"listening": PORT}`. It authenticates, validates, streams, counts and aborts as vLLM does; how a
test steers it is in `vllm_directive`. Besides vLLM's routes it has `/double/*` (state, requests, fault, health, go).
One difference: it makes a token only when the one before could be written, where vLLM goes on computing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.doubles.vllm_delivery import Died, Stream, before_headers, break_off, go_on, pause, whole
from tests.doubles.vllm_dialects import Answer, Chat, Completion, dumps
from tests.doubles.vllm_directive import SECRET, Directive
from tests.doubles.vllm_engine import (
    MEDIA_TOKENS,
    TRICKY,
    WORDS,
    Engine,
    Record,
    chat_tokens,
    prompt_list,
)
from tests.doubles.vllm_event_dialects import Messages, Responses
from tests.doubles.vllm_options import arguments
from tests.doubles.vllm_pooling import POOLING, detokenize, pool, tokenize
from tests.doubles.vllm_validation import (
    FASTAPI,
    ILL_FORMED,
    Refusal,
    ill_formed,
    message_tokens,
    missing,
    parse,
    prompt_of,
    required,
    response_tokens,
)

PREFIXES: dict[type[Answer], str] = {Chat: "chatcmpl-", Completion: "cmpl-", Responses: "resp_", Messages: "chatcmpl-"}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Double:
    """The application: routes, authentication, validation and the life of a request."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = Engine(options.model, options.max_num_seqs, options.max_model_len)
        self.queued: deque[Directive] = deque()
        self.health_status = 200

    def application(self) -> web.Application:
        """All routes."""
        app = web.Application(client_max_size=1 << 30, middlewares=[self.guard])
        generating: dict[str, tuple[type[Answer], Callable[[dict[str, Any]], list[int]], str]] = {
            "/v1/chat/completions": (Chat, lambda b: [chat_tokens(required(b, "messages"))], "max_completion_tokens"),
            "/v1/completions": (Completion, lambda b: prompt_list(prompt_of(b)), "max_tokens"),
            "/v1/responses": (Responses, lambda b: [response_tokens(required(b, "input"))], "max_output_tokens"),
            "/v1/messages": (Messages, lambda b: [message_tokens(b)], "max_tokens"),
        }
        for path, (dialect, count, field) in generating.items():
            app.router.add_post(path, self.relay(self.generate(dialect, count, field)))
        for path in POOLING:
            app.router.add_post(path, self.relay(self.pooled))
        app.router.add_post("/v1/messages/count_tokens", self.relay(self.count_tokens))
        app.router.add_post("/v1/audio/transcriptions", self.relay(self.transcribe))
        app.router.add_post("/tokenize", self.relay(self.tokenize))
        app.router.add_post("/detokenize", self.relay(self.detokenize))
        app.router.add_get("/health", self.health)
        app.router.add_get("/ping", self.health)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/version", self.version)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/double/requests", self.requests)
        app.router.add_get("/double/state", self.state)
        app.router.add_post("/double/fault", self.fault)
        app.router.add_post("/double/health", self.set_health)
        app.router.add_post("/double/go", go_on)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The key, and vLLM's errors for unknown routes."""
        if request.path.startswith(("/v1", "/v2")) and self.options.api_key is not None:
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or key != self.options.api_key:
                return json_response({"error": "Unauthorized"}, 401)
        try:
            return await handler(request)
        except web.HTTPException as error:
            return json_response({"detail": error.reason}, error.status)  # as FastAPI

    def relay(self, answer: Callable[..., Awaitable[web.StreamResponse]]) -> Handler:
        """The frame of every route with work: record, directive, refusal, cancellation."""

        async def handle(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            headers = {name.lower(): value for name, value in request.headers.items()}
            record = self.engine.record(request.path, headers, body)
            try:
                directive = Directive.find(body, headers.get("x-double"))
                if directive is None:
                    directive = self.queued.popleft() if self.queued else Directive()
                record.directive = directive.text
                await before_headers(request, directive)
                status = directive.count("status")
                if status is not None:
                    kind = "BadRequestError" if status < 500 else "InternalServerError"
                    raise Refusal("refused as told" if status < 500 else SECRET, kind, status)
                response = await answer(request, record, directive, body)
                record.end("done")
                return response
            except (Refusal, *ILL_FORMED) as error:
                refusal = error if isinstance(error, Refusal) else ill_formed()
                record.end("refused")
                content: Any = refusal.body
                told = refusal.body["error"]
                if request.path.startswith("/v1/messages") and told["type"] != FASTAPI:
                    content = {"type": "error", "error": {"type": told["type"], "message": told["message"]}}
                return json_response(content, refusal.code)
            except (asyncio.CancelledError, ConnectionError):
                record.end("cancelled")
                raise
            except Died as died:
                record.end("died")
                return died.response or web.StreamResponse()  # on a closed connection nothing of it is written

        return handle

    def parse(self, request: web.Request, body: bytes) -> dict[str, Any]:
        return parse(request.path, request.content_type, body, (self.engine.model, *self.options.alias))

    def generate(
        self, dialect: type[Answer], count: Callable[[dict[str, Any]], list[int]], field: str
    ) -> Callable[..., Awaitable[web.StreamResponse]]:
        """A handler for a generating route."""

        async def handle(request: web.Request, record: Record, directive: Directive, raw: bytes) -> web.StreamResponse:
            body = self.parse(request, raw)
            prompts = count(body)
            prompt = sum(prompts)
            limit = body.get(field) or body.get("max_tokens")
            if dialect is Messages and limit is None:
                raise missing("max_tokens")
            if limit and limit > self.engine.max_model_len:
                name = "max_completion_tokens" if dialect is Messages else field if body.get(field) else "max_tokens"
                message = f"{name}={limit} cannot be greater than max_model_len={self.engine.max_model_len}. "
                raise Refusal(f"{message}Please request fewer output tokens.", param=name)
            if dialect is Completion and limit is None:
                limit = 16
            room = self.engine.max_model_len - max(prompts)
            if room < (limit or 1):
                raise Refusal(
                    f"This model's maximum context length is {self.engine.max_model_len} tokens. However, your prompt "
                    f"contains {max(prompts)} input tokens. Please reduce the length of the input prompt.",
                    param="input_tokens",
                )
            choices = int(body.get("n") or 1) * len(prompts)
            identity = PREFIXES[dialect] + (record.request_id or str(record.number))
            answer = dialect(
                identity, body.get("model") or self.engine.model, body, prompt, choices, directive.get("usage")
            )
            answer.fingerprint = self.options.fingerprint
            record.stream = bool(body.get("stream"))
            wanted = directive.count("tokens") or self.options.tokens
            most = 1 if limit == 0 else min(limit or room, room)  # 0: the prompt is echoed, and a token computed
            if body.get("ignore_eos"):
                wanted = most
            finish = "length" if wanted > most or body.get("ignore_eos") else "stop"
            return await self.sequence(request, record, directive, answer, min(wanted, most), finish)

        return handle

    async def sequence(
        self, request: web.Request, record: Record, directive: Directive, answer: Answer, tokens: int, finish: str
    ) -> web.StreamResponse:
        """Prefill and decode, streamed or not; the engine's place is given back whatever happens."""
        stream = Stream(request, record, directive) if record.stream else None
        if stream:
            await stream.open()
            for event in answer.before_prefill():
                await stream.event(event)
        await self.engine.schedule(record)
        reason = "abort"
        try:
            await pause(directive.number("prefill_ms"), self.options.prefill_ms)
            self.engine.prefilled(record, answer.prompt)
            for event in answer.start():
                if stream:
                    await stream.event(event)
            await pause(directive.number("gap_ms"), 0)
            pace = directive.number("pace_ms")
            await self.decode(
                stream, record, directive, answer, tokens, finish, self.options.pace_ms if pace is None else pace
            )
            reason = finish
        finally:
            self.engine.free(record, reason)
        if stream is None:
            return await whole(request, record, directive, dumps(answer.body()).encode())
        events = answer.end() + ([] if directive.says("done", "no") else answer.terminal())
        for event in events:
            await stream.event(event)
        await stream.close()
        return stream.response

    async def decode(
        self,
        stream: Stream | None,
        record: Record,
        directive: Directive,
        answer: Answer,
        tokens: int,
        finish: str,
        pace: float,
    ) -> None:
        """Make `tokens` tokens for each choice, on a timetable that does not drift."""
        began = time.monotonic()
        words = TRICKY if directive.says("words", "tricky") else WORDS
        size = directive.count("token_bytes")
        for index in range(tokens):
            if pace and (wait := began + index * pace / 1000 - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            elif index % 16 == 15:
                await asyncio.sleep(0)
            if directive.count("error_after") == index:
                await self.fail(stream, answer)
            last = index == tokens - 1
            text = "x" * size if size else words[index % len(words)]
            if last and finish == "stop":
                text = ""  # the end-of-sequence token has no text
            for choice in range(answer.choices):
                self.engine.generated(record)
                for event in answer.token(choice, text, finish if last else None):
                    if stream:
                        await stream.event(event)

    async def fail(self, stream: Stream | None, answer: Answer) -> None:
        """The engine fails in the middle of a generation."""
        if stream is None:
            raise Refusal(SECRET, "InternalServerError", 500)
        events = answer.failure(SECRET)
        for event in events or []:
            await stream.event(event)
        if events is not None:
            await stream.close()
            raise Died(stream.response)
        await break_off(stream.request, "fin")

    async def pooled(
        self, request: web.Request, record: Record, directive: Directive, raw: bytes
    ) -> web.StreamResponse:
        """Embeddings, rerank, score: one prefill, no decode."""
        body = self.parse(request, raw)
        try:
            tokens, answer = pool(request.path, body, self.engine.model, record.request_id or str(record.number))
        except KeyError as error:
            raise missing(str(error.args[0])) from None
        await self.engine.schedule(record)
        reason = "abort"
        try:
            await pause(directive.number("prefill_ms"), self.options.prefill_ms)
            self.engine.prefilled(record, tokens)
            reason = "stop"
        finally:
            self.engine.free(record, reason)
        if directive.says("usage", "none"):
            answer.pop("usage", None)
        return await whole(request, record, directive, dumps(answer).encode())

    async def count_tokens(
        self, request: web.Request, record: Record, directive: Directive, raw: bytes
    ) -> web.StreamResponse:
        body = self.parse(request, raw)
        tokens = message_tokens(body)
        told = {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}
        return await self.plain(request, record, directive, told)

    async def tokenize(
        self, request: web.Request, record: Record, directive: Directive, raw: bytes
    ) -> web.StreamResponse:
        body = self.parse(request, raw)
        if body.get("messages") is None:
            required(body, "prompt")
        return await self.plain(request, record, directive, tokenize(body, self.engine))

    async def detokenize(
        self, request: web.Request, record: Record, directive: Directive, raw: bytes
    ) -> web.StreamResponse:
        body = self.parse(request, raw)
        required(body, "tokens")
        return await self.plain(request, record, directive, detokenize(body))

    async def transcribe(
        self, request: web.Request, record: Record, directive: Directive, raw: bytes
    ) -> web.StreamResponse:
        """The audio's words are not looked at: one media item in, the usual words out."""
        if request.content_type != "multipart/form-data" or b'name="file"' not in raw:
            raise missing("file")
        await self.engine.schedule(record)
        reason = "abort"
        try:
            await pause(directive.number("prefill_ms"), self.options.prefill_ms)
            self.engine.prefilled(record, MEDIA_TOKENS)
            self.engine.generated(record, self.options.tokens)
            reason = "stop"
        finally:
            self.engine.free(record, reason)
        told = {"text": "".join(WORDS[: self.options.tokens]), "usage": {"type": "duration", "seconds": 3}}
        return await whole(request, record, directive, dumps(told).encode())

    async def plain(self, request: web.Request, record: Record, directive: Directive, told: Any) -> web.StreamResponse:
        """An answer that needs no engine."""
        return await whole(request, record, directive, dumps(told).encode())

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=self.health_status)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(
            text=self.engine.metrics(), headers={"Content-Type": "text/plain; version=1.0.0; charset=utf-8"}
        )

    async def version(self, request: web.Request) -> web.StreamResponse:
        return json_response({"version": "0.32.0"})

    async def models(self, request: web.Request) -> web.StreamResponse:
        card = {"object": "model", "created": int(time.time()), "owned_by": "vllm", "root": "/models/double"}
        card.update(parent=None, max_model_len=self.engine.max_model_len, permission=[])
        return json_response(
            {"object": "list", "data": [{"id": m, **card} for m in (self.engine.model, *self.options.alias)]}
        )

    async def requests(self, request: web.Request) -> web.StreamResponse:
        return json_response(self.engine.requests())

    async def state(self, request: web.Request) -> web.StreamResponse:
        return json_response(self.engine.state())

    async def fault(self, request: web.Request) -> web.StreamResponse:
        """`{"fault": "die=headers", "times": 2}`: for the next requests that carry no directive of their own."""
        told = await request.json()
        self.queued.extend([Directive(told["fault"])] * int(told.get("times", 1)))
        return json_response({"queued": len(self.queued)})

    async def set_health(self, request: web.Request) -> web.StreamResponse:
        """`{"status": 503}`: what `/health` answers from now on."""
        self.health_status = int((await request.json())["status"])
        return json_response({"status": self.health_status})


def json_response(value: Any, status: int = 200) -> web.Response:
    """JSON as Starlette writes it."""
    return web.Response(
        body=dumps(value).encode(), status=status, headers={"Content-Type": "application/json", "Server": "uvicorn"}
    )


async def serve(options: argparse.Namespace) -> None:
    """Listen until SIGTERM or SIGINT, then abort what runs, as vLLM does by default."""
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)  # malformed requests are part of the tests
    runner = web.AppRunner(
        Double(options).application(),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=options.keep_alive,
        shutdown_timeout=0.1,
        max_line_size=65536,
        max_field_size=65536,
    )
    await runner.setup()
    site = web.TCPSite(runner, options.host, options.port, backlog=4096)
    await site.start()
    print(json.dumps({"listening": runner.addresses[0][1]}), flush=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(arguments()))
    sys.exit(0)
