"""The baseline: a gateway with the same features, written as one usually writes it. Quart on stock Hypercorn.

Usage: python -m tests.bench.plain_quart PORT UPSTREAM_PORT FOLDER
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import uuid
from typing import Any

import aiohttp
import peewee
import uvloop
from hypercorn.asyncio import serve
from hypercorn.config import Config
from loguru import logger
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from prometheus_client import REGISTRY, Counter, Histogram, generate_latest
from quart import Quart, Response, request

PORT, UPSTREAM, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
URL = f"http://127.0.0.1:{UPSTREAM}"
KEYS = {hashlib.sha256(os.environ["BENCH_KEY"].encode()).hexdigest(): "bench"}
REQUESTS = Counter("plain_requests", "Calls.", ["endpoint", "model", "key", "status"])
SECONDS = Histogram("plain_seconds", "Duration.", ["endpoint", "model"])
TOKENS = Counter("plain_tokens", "Tokens.", ["model", "direction"])

database = peewee.SqliteDatabase(f"{FOLDER}/plain.sqlite3", pragmas={"journal_mode": "wal", "synchronous": "normal"})
windows: dict[str, list[float]] = {}
app = Quart(__name__)
app.config["RESPONSE_TIMEOUT"] = None


class UsageRow(peewee.Model):
    """One call."""

    request_id = peewee.CharField(unique=True)
    key_id = peewee.CharField(index=True)
    model = peewee.CharField()
    prompt_tokens = peewee.IntegerField()
    completion_tokens = peewee.IntegerField()
    started_at = peewee.FloatField()

    class Meta:
        database = database


provider = TracerProvider(sampler=TraceIdRatioBased(0.1))
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{URL}/v1/traces")))
tracer = provider.get_tracer("plain")
logger.remove()
logger.add(sys.stdout, serialize=True)
session: aiohttp.ClientSession


@app.before_serving
async def _start() -> None:
    global session
    database.create_tables([UsageRow])
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))


@app.get("/health")
async def health() -> dict[str, str]:
    """Alive."""
    return {"status": "ok"}


@app.get("/metrics")
async def metrics() -> Response:
    """All families."""
    return Response(generate_latest(REGISTRY))


def admit(key_id: str) -> bool:
    """A sliding window of requests a minute."""
    now = time.time()
    window = windows.setdefault(key_id, [])
    while window and window[0] < now - 1:
        window.pop(0)
    window.append(now)
    return len(window) < 10_000_000


def finish(request_id: str, key_id: str, model: str, usage: dict[str, Any], started: float, status: int) -> None:
    """Row, metrics, log line."""
    UsageRow.create(
        request_id=request_id,
        key_id=key_id,
        model=model,
        prompt_tokens=usage.get("prompt_tokens", 0),
        completion_tokens=usage.get("completion_tokens", 0),
        started_at=started,
    )
    REQUESTS.labels("chat_completions", model, key_id, str(status)).inc()
    SECONDS.labels("chat_completions", model).observe(time.time() - started)
    TOKENS.labels(model, "prompt").inc(usage.get("prompt_tokens", 0))
    TOKENS.labels(model, "completion").inc(usage.get("completion_tokens", 0))
    logger.bind(request_id=request_id, key_id=key_id, model=model, status=status, usage=usage).info("call_closed")


@app.post("/v1/chat/completions")
async def chat() -> Any:
    """Relay one call."""
    started = time.time()
    request_id = request.headers.get("X-Request-Id") or str(uuid.uuid4())
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    key_id = KEYS.get(hashlib.sha256(token.encode()).hexdigest())
    if key_id is None:
        return {"error": {"message": "invalid key"}}, 401
    if not admit(key_id):
        return {"error": {"message": "rate limit"}}, 429
    body = await request.get_json()
    model = body["model"]
    span = tracer.start_span("chat", attributes={"gen_ai.request.model": model})
    headers = {"X-Request-Id": request_id}
    if not body.get("stream"):
        async with session.post(f"{URL}/v1/chat/completions", json=body, headers=headers) as response:
            answer = await response.json()
            finish(request_id, key_id, model, answer.get("usage") or {}, started, response.status)
            span.end()
            return answer, response.status, {"X-Request-Id": request_id}
    body["stream_options"] = {"include_usage": True}

    async def relay() -> Any:
        usage: dict[str, Any] = {}
        async with session.post(f"{URL}/v1/chat/completions", json=body, headers=headers) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if event.get("usage"):
                        usage = event["usage"]
                        if not event["choices"]:
                            await response.content.readline()
                            continue
                yield line
        finish(request_id, key_id, model, usage, started, 200)
        span.end()

    return Response(relay(), content_type="text/event-stream")


async def main() -> None:
    """Serve for ever."""
    config = Config()
    config.bind = [f"127.0.0.1:{PORT}"]
    config.backlog = 4096
    await serve(app, config)


if __name__ == "__main__":
    uvloop.run(main())
