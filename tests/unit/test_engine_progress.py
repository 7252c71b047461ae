"""The middleware that counts calls inside vLLM's API server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import REGISTRY

from engine.progress import HEADER, PATH, Progress


class Caller:
    """Plays the server's side of one call: a body in pieces, and what was sent."""

    def __init__(self, body: list[bytes]) -> None:
        self._body = body
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": self._body.pop(0), "more_body": bool(self._body)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


def scope(path: str = "/v1/completions", method: str = "POST", token: bytes | None = None) -> dict[str, Any]:
    return {"type": "http", "path": path, "method": method, "headers": [(HEADER, token)] if token else []}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> tuple[Progress, asyncio.Event]:
    """A middleware over an application that reads the body, answers once, waits for the event, answers again."""
    monkeypatch.setenv("ENGINE_PROGRESS_TOKEN", "t0ken")
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go.wait()
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return Progress(app), go


async def test_a_call_is_counted_from_its_body_to_its_end(gate: tuple[Progress, asyncio.Event]) -> None:
    progress, go = gate
    caller = Caller([b"a" * 100, b"b" * 50])
    call = asyncio.create_task(progress(scope(), caller.receive, caller.send))
    await asyncio.sleep(0)
    state = progress.state()
    assert (state["calls"], state["silent_calls"], state["longest_silent_bytes"]) == (1, 1, 150)
    go.set()
    await call
    assert progress.state() == {
        "calls": 0, "silent_calls": 0, "longest_silent_bytes": 0, "oldest_seconds": 0.0, "chunks": 1,
    }  # fmt: skip


async def test_a_cancelled_call_is_no_longer_inside(gate: tuple[Progress, asyncio.Event]) -> None:
    progress, _ = gate
    caller = Caller([b"a"])
    call = asyncio.create_task(progress(scope(), caller.receive, caller.send))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert progress.state()["calls"] == 0


async def test_the_supervisors_canary_is_not_counted(gate: tuple[Progress, asyncio.Event]) -> None:
    progress, go = gate
    caller = Caller([b"a"])
    call = asyncio.create_task(progress(scope(token=b"t0ken"), caller.receive, caller.send))
    await asyncio.sleep(0)
    assert progress.state()["calls"] == 0
    go.set()
    await call


async def test_the_page_is_for_the_supervisor_alone(gate: tuple[Progress, asyncio.Event]) -> None:
    progress, go = gate
    go.set()
    ours, stranger = Caller([b""]), Caller([b""])
    await progress(scope(PATH, "GET", b"t0ken"), ours.receive, ours.send)
    assert json.loads(ours.sent[1]["body"])["calls"] == 0
    await progress(scope(PATH, "GET", b"wrong"), stranger.receive, stranger.send)
    assert stranger.sent[1]["body"] == b"x"  # the application's answer: for others there is no such page


async def test_what_the_supervisors_own_calls_cost_stands_on_vllms_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_PROGRESS_TOKEN", "t0ken")
    answers = [b'{"usage":{"prompt_tokens":2,', b'"total_tokens":3}}']

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in answers:
            await send({"type": "http.response.body", "body": part, "more_body": part is not answers[-1]})

    progress = Progress(app)

    def counted() -> float:
        return REGISTRY.get_sample_value("engine_own_tokens_total") or 0.0

    before = counted()
    for token in (b"t0ken", None, b"other"):
        caller = Caller([b"{}"])
        await progress(scope(token=token), caller.receive, caller.send)
        assert [message.get("body") for message in caller.sent[1:]] == answers
    assert counted() - before == 3
    answers[:] = [b'{"error":{}}']
    await progress(scope(token=b"t0ken"), Caller([b"{}"]).receive, Caller([]).send)
    assert counted() - before == 3
