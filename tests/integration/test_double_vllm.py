"""The vLLM double must behave as the engine does, or every test behind it proves nothing."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.doubles.vllm import VllmDouble
from tests.doubles.vllm_directive import SECRET, Directive
from tests.doubles.waiting import wait_until

KEY = "engine-key"
ASK = [{"role": "user", "content": "one two three"}]
USAGE = {"include_usage": True, "continuous_usage_stats": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(api_key=KEY, max_num_seqs=4) as double:
        yield double


def post(engine: VllmDouble, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
    """One POST on a connection of its own; raises what http.client raises on a broken answer."""
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
    sent = {"content-type": "application/json", "authorization": f"Bearer {KEY}", **headers}
    try:
        connection.request("POST", path, json.dumps(body), {name.replace("_", "-"): v for name, v in sent.items()})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def chat(directive: str = "", **fields: Any) -> dict[str, Any]:
    """A chat body that carries `directive` in its text, so that it passes any gateway."""
    messages = [*ASK, {"role": "user", "content": f"double:{directive}"}] if directive else ASK
    return {"model": "double", "messages": messages, **fields}


def events(raw: bytes) -> list[bytes]:
    """The data of each event."""
    assert raw.endswith(b"\n\n")
    return [block.partition(b"data: ")[2] for block in raw[:-2].split(b"\n\n")]


def last(engine: VllmDouble) -> dict[str, Any]:
    """The newest record."""
    return engine.requests()[-1]


def test_running_usage_stands_on_every_chunk_and_sums_up(engine: VllmDouble) -> None:
    _, raw = post(engine, "/v1/chat/completions", chat("tokens=5", stream=True, n=2, stream_options=USAGE))

    *chunks, done = events(raw)
    parsed = [json.loads(chunk) for chunk in chunks]
    assert done == b"[DONE]"
    assert all("usage" in chunk for chunk in parsed)
    assert parsed[0]["usage"]["completion_tokens"] == 0
    assert parsed[-1]["choices"] == []
    # As vLLM: running usage counts the chunk's own choice, the final one all of them.
    assert max(chunk["usage"]["completion_tokens"] for chunk in parsed[:-1]) == 5
    assert parsed[-1]["usage"]["completion_tokens"] == 10 == last(engine)["completion_tokens"]
    assert parsed[-1]["usage"]["prompt_tokens"] == 3 + 1 + 4 + 4 == last(engine)["prompt_tokens"]


def test_no_usage_unless_asked(engine: VllmDouble) -> None:
    _, raw = post(engine, "/v1/chat/completions", chat(stream=True))

    assert b'"usage"' not in raw


def test_the_official_client_reads_every_form(engine: VllmDouble) -> None:
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key=KEY, max_retries=0) as client:
        whole = client.chat.completions.create(**chat("tokens=4", max_tokens=4))
        stream = client.chat.completions.create(**chat("tokens=4", max_tokens=3, stream=True, stream_options=USAGE))
        chunks = list(stream)
        tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
        called = client.chat.completions.create(**chat("tokens=5", stream=True, tools=tools))
        pieces = [c.choices[0].delta.tool_calls[0].function.arguments for c in called if c.choices[0].delta.tool_calls]
        embedded = client.embeddings.create(model="double", input=["a b", "c"])
        response = client.responses.create(model="double", input="a b", stream=True)
        kinds = [event.type for event in response]

    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 4
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 3
    assert json.loads("".join(pieces)) == {"text": "quickbrownfüchs"}
    assert embedded.usage.prompt_tokens == 3
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_messages_and_completions_count_exactly(engine: VllmDouble) -> None:
    _, raw = post(engine, "/v1/messages", {**chat("tokens=4", stream=True), "max_tokens": 9, "system": "be brief"})
    told = [json.loads(event) for event in events(raw)]
    _, raw = post(engine, "/v1/completions", {"prompt": ["a b", "c"], "n": 2, "max_tokens": 2})

    assert told[0]["message"]["usage"]["input_tokens"] == 14
    assert told[-2]["usage"] == {"input_tokens": 14, "output_tokens": 4}
    assert told[-1] == {"type": "message_stop"}
    assert json.loads(raw)["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 11,
        "completion_tokens": 8,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }


def test_the_key_guards_v1_only(engine: VllmDouble) -> None:
    status, raw = post(engine, "/v1/chat/completions", chat(), authorization="Bearer wrong")
    open_status, _ = post(engine, "/tokenize", {"prompt": "a b"}, authorization="")

    assert (status, json.loads(raw)) == (401, {"error": "Unauthorized"})
    assert open_status == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": ASK, "model": "nobody"}, 404, "model"),
        ({}, 400, "body.messages"),
        ({"messages": ASK, "temperature": -1}, 400, "temperature"),
        ({"messages": ASK, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"messages": [{"role": "user", "content": "w " * 9000}]}, 400, "input_tokens"),
    ],
)
def test_refusals_look_like_vllm(engine: VllmDouble, body: dict[str, Any], status: int, param: str) -> None:
    got, raw = post(engine, "/v1/chat/completions", body)

    error = json.loads(raw)["error"]
    assert (got, error["code"], error["param"]) == (status, status, param)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_a_client_that_leaves_stops_the_work(engine: VllmDouble, how: str, stream: bool, phase: str) -> None:
    told = {"waiting": "tokens=1", "prefill": "prefill_ms=60000", "decode": "tokens=4000,pace_ms=20"}[phase]
    full = [open_chat(engine, "prefill_ms=60000") for _ in range(4)] if phase == "waiting" else []
    if full:
        wait_until("the batch is full", lambda: engine.state()["running"] == 4)
    before = engine.state()["running"]
    connection = open_chat(engine, told, stream=stream)
    wait_until(f"the request is in {phase}", lambda: last(engine)["state"] == phase)
    if phase == "decode":
        wait_until("three tokens", lambda: last(engine)["completion_tokens"] >= 3)

    drop(connection, how)

    record = wait_until("the request is cancelled", lambda: (r := last(engine))["ended_at"] and r)
    assert record["state"] == "cancelled"
    assert engine.state()["running"] == before
    for other in full:
        drop(other, "fin")
    engine.wait_idle()


def open_chat(engine: VllmDouble, directive: str, stream: bool = True) -> socket.socket:
    """Send a chat request and return the connection without reading."""
    body = json.dumps(chat(directive, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", engine.port))
    connection.sendall(head.encode() + body)
    return connection


def drop(connection: socket.socket, how: str) -> None:
    """Close by FIN or RST."""
    if how == "rst":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.close()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("die=headers", http.client.RemoteDisconnected),
        ("die=headers,how=rst", ConnectionResetError),
        ("garbage=headers", http.client.BadStatusLine),
        ("die_after=2", http.client.IncompleteRead),
        ("die_after=2,how=rst", ConnectionResetError),
    ],
)
def test_faults_break_the_connection(engine: VllmDouble, fault: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        post(engine, "/v1/chat/completions", chat(fault, stream=True))

    record = last(engine)
    assert record["state"] == "died"
    assert record["events"] == (2 if "after" in fault else 0)


def test_faults_that_keep_http_in_order(engine: VllmDouble) -> None:
    stream = {"stream": True}
    assert SECRET in post(engine, "/v1/chat/completions", chat("status=500"))[1].decode()
    assert post(engine, "/v1/chat/completions", chat("status=503"))[0] == 503
    failed = events(post(engine, "/v1/chat/completions", chat("error_after=2", **stream))[1])
    assert (b"error" in failed[-2], failed[-1]) == (True, b"[DONE]")
    assert not post(engine, "/v1/chat/completions", chat("done=no", **stream))[1].endswith(b"[DONE]\n\n")
    assert not post(engine, "/v1/chat/completions", chat("die_after=3,how=clean", **stream))[1].endswith(b"[DONE]\n\n")
    assert b"garbage" in post(engine, "/v1/chat/completions", chat("garbage_after=1", **stream))[1]
    with pytest.raises(json.JSONDecodeError):
        json.loads(post(engine, "/v1/chat/completions", chat("json=broken"))[1])
    with pytest.raises(http.client.IncompleteRead):
        post(engine, "/v1/chat/completions", chat("die_after=40"))


def test_a_queued_fault_meets_requests_without_their_own(engine: VllmDouble) -> None:
    engine.fault("status=418", times=1)

    assert [post(engine, "/v1/chat/completions", chat(d))[0] for d in ("tokens=2", "", "")] == [200, 418, 200]


@pytest.mark.parametrize("told", ["split=1", "split=7", "coalesce=3", "words=tricky"])
def test_the_bytes_do_not_depend_on_the_writes(engine: VllmDouble, told: str) -> None:
    base = "tokens=9" + (",words=tricky" if "tricky" in told else "")
    plain = post(engine, "/v1/chat/completions", chat(base, stream=True), x_request_id="same")[1]
    other = post(engine, "/v1/chat/completions", chat(f"tokens=9,{told}", stream=True), x_request_id="same")[1]

    def without_time(raw: bytes) -> list[bytes]:
        return [event.partition(b'"model"')[2] for event in events(raw)]

    assert without_time(other) == without_time(plain)


def test_metrics_and_health(engine: VllmDouble) -> None:
    state = engine.state()
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    engine.health(503)
    connection.request("GET", "/health")
    sick = connection.getresponse()
    sick.read()
    engine.health(200)
    connection.close()

    assert f'vllm:generation_tokens_total{{engine="0",model_name="double"}} {float(state["generation_tokens"])}' in text
    assert "vllm:iteration_tokens_total_count{" in text
    assert sick.status == 503


def test_it_starts_again_on_the_same_port() -> None:
    with VllmDouble() as double:
        port = double.port
        double.kill()
        double.start()

        assert double.port == port
        assert double.state()["requests"] == 0


def test_an_unknown_directive_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown directive"):
        Directive("tokns=3")
