"""What opens an engine's breaker for everybody, and what closes it: the engine's doing, never one caller's request."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from tests.doubles.flow_site import PATHS, Wire, asking, ledger, metric
from tests.doubles.gateway import GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.scripted_engine import DONE, FAILURE, ScriptedEngine, begin, event, send, streamed, token, whole
from tests.doubles.waiting import wait_until

FAILURES = 5  # BREAKER_FAILURES


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(fail=FAILURE) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def process(engine: ScriptedEngine) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url, BREAKER_SECONDS=1) as running:
        yield running


@pytest.fixture
def gateway(process: GatewayProcess) -> GatewayProcess:
    """With a breaker that the test before may have opened, and that is closed again."""
    wait_until("the breaker is closed", lambda: process.chat().status == 200, patience(20.0))
    return process


@pytest.mark.parametrize("asked", ["bytes", "bytes_only", "rubbish", 7])
def test_embeddings_in_a_form_that_tells_no_usage_are_refused(
    gateway: GatewayProcess, engine: ScriptedEngine, asked: Any
) -> None:
    """vLLM answers `bytes` with usage in a header, or with none: nothing of it could be counted."""
    engine.scripts["bytes"] = whole(b"\x00\x01\xff" * 30, kind="application/octet-stream")
    for number in range(FAILURES + 1):
        request_id = f"formats-{asked}-{number}"
        body = {"model": "double", "input": "script:bytes", "encoding_format": asked}
        answer = gateway.post("/v1/embeddings", body, x_request_id=request_id)

        assert (answer.status, answer.json["error"]["param"]) == (400, "encoding_format")
        assert "'float'" in answer.json["error"]["message"]
        row = ledger(gateway, request_id)
        assert (row["outcome"], row["prompt_tokens"]) == ("refused", 0)

    assert "bytes" not in engine.asked
    assert gateway.chat().status == 200


@pytest.mark.parametrize("fields", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"},
                                    {"encoding_format": None}])  # fmt: skip
def test_the_other_forms_pass(gateway: GatewayProcess, fields: dict[str, Any]) -> None:
    assert gateway.post("/v1/embeddings", {"model": "double", "input": "a", **fields}).status == 200


def test_an_event_that_is_longer_than_we_relay_says_nothing_about_the_engine(
    gateway: GatewayProcess, engine: ScriptedEngine
) -> None:
    """`echo` with `logprobs` puts a whole prompt's into one event; whoever asks for it must not stop everybody."""
    long = event({"id": "c", "choices": [{"index": 0, "text": "x" * 5_000_000, "finish_reason": None}]})
    engine.scripts["long"] = streamed([long, DONE])
    for _ in range(FAILURES + 1):
        answer = gateway.post("/v1/completions", {"model": "double", "prompt": "script:long", "stream": True})
        assert b'"upstream_error"' in answer.body
        assert b"[DONE]" not in answer.body

    assert gateway.chat().status == 200


def test_a_stream_that_is_cut_at_its_quota_says_nothing_about_the_engine(
    gateway: GatewayProcess, engine: ScriptedEngine
) -> None:
    start = event({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 3, "output_tokens": 0}}},
                  "message_start")  # fmt: skip
    delta = event({"type": "content_block_delta", "index": 0, "delta": {"text": "a"}}, "content_block_delta")
    engine.scripts["goes_on"] = streamed([start, *[delta] * 300])
    for number in range(FAILURES + 1):
        key = gateway.admin("POST", "/admin/keys", {"name": f"k{number}", "daily_tokens": 200}).json["secret"]
        body = {"model": "double", "max_tokens": 5, "stream": True,
                "messages": [{"role": "user", "content": "script:goes_on"}]}  # fmt: skip
        assert b"event: error" in gateway.post("/v1/messages", body, key=key).body

    assert gateway.chat().status == 200


def test_counting_tokens_makes_no_failures(gateway: GatewayProcess) -> None:
    """The engine's front end counts tokens, whatever became of what generates them."""
    for _ in range(FAILURES + 1):
        assert gateway.post("/v1/tokenize", {"model": "double", "prompt": "script:fail"}).status == 502

    assert gateway.chat().status == 200


def test_counting_tokens_hides_no_failures(gateway: GatewayProcess) -> None:
    for number in range(FAILURES):
        if number:
            assert gateway.post("/v1/tokenize", {"model": "double", "prompt": "x"}).status == 200
        assert gateway.chat("script:fail").status == 502

    assert gateway.chat().code == "no_backend"


def opened(gateway: GatewayProcess) -> None:
    """Open the breaker and wait until a probe may go."""
    for _ in range(FAILURES):
        assert gateway.chat("script:fail").status == 502
    assert gateway.get("/ready").status == 503
    wait_until("half-open", lambda: gateway.get("/ready").status == 200, patience(10.0))


def test_a_probe_that_streams_closes_the_breaker_with_its_first_token(
    gateway: GatewayProcess, engine: ScriptedEngine
) -> None:
    go_on = threading.Event()

    def long(to: BaseHTTPRequestHandler) -> None:
        begin(to)
        send(to, token(1))
        go_on.wait(60)
        for data in (token(2, "stop"), DONE, b""):
            send(to, data)

    engine.scripts["long"] = long
    opened(gateway)
    try:
        with Wire(gateway.port, PATHS["chat"], asking("chat", "", messages=said("script:long"), stream=True)) as probe:
            probe.read_until(b'"content":"a"')

            assert [gateway.chat().status for _ in range(3)] == [200] * 3
            assert gateway.get("/ready").status == 200
            go_on.set()
            probe.read_until(b"[DONE]")
    finally:
        go_on.set()


def test_a_probe_that_takes_long_is_not_the_only_one(gateway: GatewayProcess, engine: ScriptedEngine) -> None:
    """A long answer in one piece shows nothing of itself before its end."""
    go_on = threading.Event()

    def slow(to: BaseHTTPRequestHandler) -> None:
        go_on.wait(60)
        engine.scripts["default"](to)

    engine.scripts["slow"] = slow
    opened(gateway)
    try:
        with Wire(gateway.port, PATHS["chat"], asking("chat", "", messages=said("script:slow"))) as probe:
            wait_until("the engine has the probe", lambda: engine.asked.get("slow"), patience(10.0))
            wait_until("another call is let through", lambda: gateway.chat().status == 200, patience(10.0))
            go_on.set()
            assert probe.read_until(b"usage").startswith(b"HTTP/1.1 200")
    finally:
        go_on.set()


def test_an_engine_whose_streams_flow_is_not_failing_altogether(
    gateway: GatewayProcess, engine: ScriptedEngine
) -> None:
    made: list[int] = [0]

    def flowing(to: BaseHTTPRequestHandler) -> None:
        begin(to)
        for made[0] in itertools.count(1):
            send(to, token(made[0]))
            time.sleep(0.005)

    engine.scripts["flowing"] = flowing
    with Wire(gateway.port, PATHS["chat"], asking("chat", "", messages=said("script:flowing"), stream=True)) as stream:
        stream.read_until(b'"content":"a"')
        reader = threading.Thread(target=stream.read_all, daemon=True)
        reader.start()

        statuses = []
        for _ in range(3 * FAILURES):
            before = made[0]
            wait_until("the stream goes on", lambda: made[0] > before + 3, patience(10.0))  # noqa: B023
            statuses.append(gateway.chat("script:fail").status)

        assert statuses == [502] * 3 * FAILURES
        assert gateway.chat().status == 200
        stream.plain.shutdown(socket.SHUT_RDWR)
        reader.join(60)


@pytest.mark.parametrize("how", ["breaks", "stays"])
def test_what_an_engine_does_behind_its_last_event_changes_nothing(
    gateway: GatewayProcess, engine: ScriptedEngine, how: str
) -> None:
    """The answer is whole and recorded; only the connection cannot be used again."""
    left = threading.Event()

    def script(to: BaseHTTPRequestHandler) -> None:
        streamed([token(1, "stop"), DONE], end=False)(to)
        if how == "stays":
            left.wait(60)

    engine.scripts["behind"] = script
    before = metric(gateway, "gateway_in_flight_calls")
    try:
        for number in range(FAILURES + 1):
            request_id = f"behind-{how}-{number}"
            body = asking("chat", "", messages=said("script:behind"), stream=True)
            answer = gateway.post(PATHS["chat"], body, x_request_id=request_id)

            assert answer.body.endswith(b"data: [DONE]\n\n")
            told = gateway.closed(request_id)
            assert (told["outcome"], told["status"], told["code"]) == ("ok", 200, None)
            assert ledger(gateway, request_id)["outcome"] == "ok"
    finally:
        left.set()

    assert not [line for line in gateway.lines if line.get("event") == "server_application_failed"]
    assert gateway.chat().status == 200
    wait_until("nothing runs", lambda: metric(gateway, "gateway_in_flight_calls") == before, patience(10.0))


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
