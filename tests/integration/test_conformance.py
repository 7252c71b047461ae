"""The conformance tool: the gateway passes whole, and every lie of an endpoint is found."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tests.conformance import checks_errors, checks_stream
from tests.conformance.__main__ import run
from tests.conformance.endpoint import Endpoint
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayProcess]:
    # The tool breaks every stream on purpose; the breaker is proved elsewhere.
    with (
        VllmDouble(pace_ms=20, tokens=24) as engine,
        GatewayProcess(VLLM_URL=engine.url, BREAKER_FAILURES=1000) as running,
    ):
        yield running


def conformance(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`make conformance` as a user runs it."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    return subprocess.run(
        ["scripts/conformance", *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"} | dict(v.split("=", 1) for v in variables),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_gateway_passes_whole(gateway: GatewayProcess) -> None:
    done = conformance("--faults", "--json", URL=gateway.url, KEY=KEY)

    assert done.returncode in (0, 1), done.stderr
    report = json.loads(done.stdout)
    assert [row for row in report["checks"] if row["result"] != "pass"] == []
    assert len(report["checks"]) >= 27
    assert done.returncode == 0


def test_the_table_and_the_exit_status(gateway: GatewayProcess) -> None:
    good = conformance(URL=f"{gateway.url}/v1", KEY=KEY)
    wrong = conformance(URL=gateway.url, KEY="sk-wrong-0123456789", MODEL="double")
    nobody = conformance(URL="http://127.0.0.1:9", KEY=KEY)

    assert good.returncode == 0, good.stdout
    assert "pass  stream-framing" in good.stdout
    assert wrong.returncode == 1
    assert "FAIL  chat-json" in wrong.stdout
    assert nobody.returncode == 2
    assert "name one with MODEL" in nobody.stderr
    assert conformance().returncode == 2


# An endpoint that behaves but for one lie.

CHUNK: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {**CHUNK, "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


GOOD = [delta(role="assistant", content=""), delta(content="one"), delta("stop", content=" two")]
FINAL = {**CHUNK, "choices": [], "usage": USAGE}
LIES: dict[str, tuple[str, Callable[[bool], list[bytes]]]] = {
    "two ends": ("stream_framing", lambda usage: [*map(event, GOOD), event(b"[DONE]"), event(b"[DONE]")]),
    "text after the end": ("stream_framing", lambda usage: [*map(event, GOOD), event(b"[DONE]"), event(GOOD[1])]),
    "no end": ("stream_framing", lambda usage: [*map(event, GOOD)]),
    "half an event": ("stream_framing", lambda usage: [*map(event, GOOD), event(b"[DONE]"), b"data: {"]),
    "no event": ("stream_framing", lambda usage: [b"hello\n\n", *map(event, GOOD), event(b"[DONE]")]),
    "broken JSON": ("stream_framing", lambda usage: [event(b'{"id": '), event(b"[DONE]")]),
    "no finish": ("stream_choices", lambda usage: [*map(event, GOOD[:2]), event(b"[DONE]")]),
    "two finishes": ("stream_choices", lambda usage: [*map(event, [*GOOD, GOOD[2]]), event(b"[DONE]")]),
    "no role": ("stream_choices", lambda usage: [*map(event, GOOD[1:]), event(b"[DONE]")]),
    "usage unasked": ("stream_unasked", lambda usage: [*map(event, [*GOOD, FINAL]), event(b"[DONE]")]),
    "usage refused": ("stream_usage", lambda usage: [*map(event, GOOD), event(b"[DONE]")]),
    "usage that does not add up": (
        "stream_usage",
        lambda usage: [
            *map(event, [*GOOD, {**FINAL, "usage": {**USAGE, "total_tokens": 9}}]),
            event(b"[DONE]"),
        ],
    ),
}


async def against(check: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> dict[str, str]:
    """One check against an endpoint that is one handler."""
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    found = getattr(checks_stream, check, None) or getattr(checks_errors, check)
    try:
        async with Endpoint(url, "sk-key-0123456789", "m", 5.0, verify=True) as endpoint:
            return await run(found, endpoint)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_in_a_stream_is_found(lie: str) -> None:
    check, stream = LIES[lie]

    async def handler(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in stream(bool(asked.get("stream_options"))):
            await response.write(piece)
        return response

    assert (await against(check, handler))["result"] == "FAIL"


async def test_the_same_stream_without_a_lie_passes() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in [*GOOD, *([FINAL] if asked.get("stream_options") else [])]:
            await response.write(event(piece))
        await response.write(event(b"[DONE]"))
        return response

    results = {
        c: (await against(c, handler)) for c in ("stream_framing", "stream_choices", "stream_unasked", "stream_usage")
    }
    assert {row["result"] for row in results.values()} == {"pass"}, results


ERROR = {"error": {"message": "no", "type": "t", "code": "c", "param": None}}
BAD_ERRORS: dict[str, tuple[int, Any]] = {
    "200 with an error in it": (200, ERROR),
    "plain text": (404, "not found"),
    "no code": (404, {"error": {"message": "no", "type": "t", "param": None}}),
    "a string for an error": (404, {"error": "Unauthorized"}),
    "a server error for a caller's mistake": (500, ERROR),
    "internals": (404, {"error": {**ERROR["error"], "message": 'File "/usr/lib/x.py", line 3'}}),
}


@pytest.mark.parametrize("lie", BAD_ERRORS)
async def test_a_bad_error_is_found(lie: str) -> None:
    status, body = BAD_ERRORS[lie]

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    assert (await against("unknown_model", handler))["result"] == "FAIL"


async def test_answers_that_come_all_at_once_are_found() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        held = loop.create_future()
        loop.call_later(0.4, held.set_result, None)  # a proxy that buffers
        await held
        for _ in range(20):
            await response.write(event(GOOD[1]))
        await response.write(event(b"[DONE]"))
        return response

    assert (await against("stream_pieces", handler))["result"] == "FAIL"


def test_every_check_says_what_it_expects() -> None:
    checks = [*checks_stream.CHECKS, *checks_errors.CHECKS, *checks_errors.WITH_FAULTS]

    assert all(check.__doc__ for check in checks)
    assert len({check.__name__ for check in checks}) == len(checks)
