"""The API as its users see it: curl, the official client, wrong keys, wrong routes."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble

from gateway.wire import ENDPOINTS


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(api_key="engine-secret") as double:
        yield double


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY="engine-secret") as process:
        yield process


@pytest.fixture
def client(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as api:
        yield api


def test_the_official_client_chats(client: openai.OpenAI):
    answer = client.chat.completions.create(model="double", messages=[{"role": "user", "content": "hello"}])

    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_the_official_client_streams(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="double", messages=[{"role": "user", "content": "hello"}], stream=True
    )

    chunks = list(stream)

    assert all(chunk.choices for chunk in chunks), "no usage chunk for a client that did not ask"
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length" or chunks[-1].choices[0].finish_reason == "stop"


def test_the_official_client_gets_usage_when_it_asks(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="double",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)

    assert chunks[-1].usage is not None
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_official_client_completes_and_lists_models(client: openai.OpenAI):
    assert client.completions.create(model="double", prompt="hello").choices[0].text
    assert [model.id for model in client.models.list()] == ["double"]
    assert client.models.retrieve("double").id == "double"


def test_the_official_client_understands_refusals(client: openai.OpenAI, gateway: GatewayProcess):
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.chat.completions.create(model="nonesuch", messages=[{"role": "user", "content": "x"}])
    with (
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="sk-wrong-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as wrong_key,
    ):
        stranger.models.list()

    assert wrong_model.value.code == "model_not_found"
    assert wrong_key.value.code == "invalid_api_key"


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/models", "/v1/usage"])
@pytest.mark.parametrize(("key", "code"), [(None, "missing_api_key"), ("sk-foreign-foreign", "invalid_api_key")])
def test_no_route_answers_a_stranger(gateway: GatewayProcess, path: str, key: str | None, code: str):
    method = "POST" if path in ENDPOINTS else "GET"

    answer = gateway.request(method, path, {"model": "double"} if method == "POST" else None, key)

    assert (answer.status, answer.code) == (401, code)
    assert answer.headers["x-request-id"]


def test_either_header_carries_the_key(gateway: GatewayProcess):
    assert gateway.get("/v1/models", None, x_api_key=KEY).status == 200
    assert gateway.get("/v1/models", None, authorization=f"bearer {KEY}").status == 200
    assert gateway.get("/v1/models", KEY, x_api_key="sk-another-one").status == 401


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/", 404), ("GET", "/v1", 404), ("POST", "/v1/nonesuch", 404), ("POST", "/invocations", 404),
    ("POST", "/v1/chat/completions/", 404), ("POST", "//v1/chat/completions", 405), ("GET", "/v1/chat/completions", 405),
    ("DELETE", "/v1/models", 405), ("POST", "/tokenize", 404), ("GET", "/v1/../metrics", 404),
    ("POST", "/v1/%63hat/completions%00", 404),
])  # fmt: skip
def test_everything_else_is_not_here(gateway: GatewayProcess, engine: VllmDouble, method: str, path: str, status: int):
    before = len(engine.requests())

    answer = gateway.request(method, path, {} if method == "POST" else None)

    assert (answer.status, answer.code) == (status, "unknown_route")
    assert answer.headers["x-request-id"]
    assert len(engine.requests()) == before


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_a_relayed_route_says_that_it_takes_post(gateway: GatewayProcess, method: str):
    answer = gateway.request(method, "/v1/messages")

    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "unknown_route", "POST")


def test_every_relayed_route_reaches_the_engine_with_our_key_and_not_the_callers(
    gateway: GatewayProcess, engine: VllmDouble
):
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/embeddings": {"input": ["x", "y"]},
        "/v1/rerank": {"query": "x", "documents": ["y", "z"]},
        "/v1/score": {"text_1": "x", "text_2": "y"},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/tokenize": {"prompt": "x"},
        "/v1/detokenize": {"tokens": [1, 2]},
    }
    for path, body in bodies.items():
        answer = gateway.post(path, {"model": "double", "priority": -5, **body}, x_vllm_priority="-5", cookie="a=b")
        assert answer.status == 200, (path, answer.body)
        seen = engine.requests()[-1]
        headers = {name.lower(): value for name, value in dict(seen["headers"]).items()}
        assert headers["authorization"] == "Bearer engine-secret", path
        assert KEY not in json.dumps(seen), path
        assert not {"x-vllm-priority", "cookie", "user-agent", "x-api-key"} & set(headers), path
        assert "priority" not in seen["body"], path


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True, "logprobs": 0}),
    ("/v1/completions", {"prompt": "hello", "max_tokens": 0, "echo": True, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 100.0, "n": 1.0}),
    ("/v1/embeddings", {"input": ["x"] * 1_000}),
    ("/v1/embeddings", {"input": ["x"] * 2_048}),
])  # fmt: skip
def test_what_vllm_takes_is_not_refused(gateway: GatewayProcess, path: str, body: dict[str, Any]):
    answer = gateway.post(path, {"model": "double", **body})

    assert answer.status == 200, answer.body


def test_more_inputs_than_openai_takes_are_refused(gateway: GatewayProcess):
    answer = gateway.post("/v1/embeddings", {"model": "double", "input": ["x"] * 2_049})

    assert (answer.status, answer.json["error"]["param"]) == (400, "input")


ARGUMENTS = [
    {"file": "C:\\src\\a.py"}, {"source": "https://example.com/x"}, {"image": "nginx:1.25"}, {"file_url": "https://x/y"},
    {"edits": [{"file": "C:\\a.py"}] * 20},
]  # fmt: skip


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_what_a_tool_is_given_is_not_taken_for_media(gateway: GatewayProcess, arguments: Any):
    schema = {"type": "object", "properties": {"file": {"type": "string", "default": "https://x/y"}}}
    question = {"role": "user", "content": "hello"}
    used = [{"type": "tool_use", "id": "t1", "name": "t", "input": arguments}]
    result = [{"type": "tool_result", "tool_use_id": "t1", "content": "ok"}]
    messages = [question, {"role": "assistant", "content": used}, {"role": "user", "content": result}]
    tools = [{"name": "t", "input_schema": schema}]
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        limit = {"max_tokens": 5} if path == "/v1/messages" else {}
        answer = gateway.post(path, {"model": "double", "messages": messages, "tools": tools, **limit})
        assert answer.status == 200, answer.body
    call = {"id": "t1", "type": "function", "function": {"name": "t", "arguments": json.dumps(arguments)}}
    answer = gateway.post("/v1/chat/completions", {
        "model": "double",
        "messages": [question, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "t1", "content": "ok"}],
        "tools": [{"type": "function", "function": {"name": "t", "parameters": schema}}],
        "documents": [{"source": "https://example.com/x", "text": "y"}],
    })  # fmt: skip
    assert answer.status == 200, answer.body


def test_a_transcription_is_relayed_as_it_came(gateway: GatewayProcess):
    boundary = "----b0undary"
    form = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="model"\r\n\r\ndouble\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\nRIFFdata\r\n"
        f"--{boundary}--\r\n"
    ).encode()

    answer = gateway.request(
        "POST", "/v1/audio/transcriptions", form, content_type=f"multipart/form-data; boundary={boundary}"
    )

    assert answer.status == 200, answer.body
    assert "text" in answer.json


def test_answers_say_who_they_are_and_where_the_time_went(gateway: GatewayProcess):
    answer = gateway.chat(x=1)

    assert answer.headers["content-type"] == "application/json"
    timing = answer.headers["server-timing"]
    for stage in ("auth", "budget", "capacity", "forward", "total"):
        assert f"{stage};dur=" in timing
    closed = gateway.closed(answer.headers["x-request-id"])
    assert (closed["outcome"], closed["status"], closed["model"]) == ("ok", 200, "double")
    assert closed["completion_tokens"] == answer.json["usage"]["completion_tokens"]


def test_a_callers_request_id_is_kept_once(gateway: GatewayProcess):
    ids = [
        gateway.post(
            "/v1/chat/completions", {"model": "double", "messages": []}, x_request_id="my-request.0001"
        ).headers["x-request-id"]
        for _ in range(2)
    ]

    assert ids[0] == "my-request.0001"
    assert ids[1].startswith("my-request.0001.")
    assert gateway.get("/health", x_request_id="bad id \x01").headers["x-request-id"] != "bad id \x01"


@pytest.mark.parametrize("fault", ["status=500", "status=502"])
def test_the_engines_failures_are_not_quoted(gateway: GatewayProcess, engine: VllmDouble, fault: str):
    answer = gateway.chat(f"double:{fault}")

    assert (answer.status, answer.code) == (502, "upstream_error")
    assert b"double" not in answer.body


def test_health_ready_and_metrics(gateway: GatewayProcess):
    assert gateway.get("/health", None).status == 200
    assert gateway.get("/ready", None).json["ready"] is True
    plain = gateway.get("/metrics", None)
    rich = gateway.get("/metrics", None, accept="application/openmetrics-text; version=1.0.0")
    assert b"gateway_requests_total{" in plain.body
    assert rich.body.endswith(b"# EOF\n")


def test_not_ready_names_the_cause_and_when_to_ask_again():
    gateway = GatewayProcess(VLLM_URL="http://127.0.0.1:9").start(ready=False)
    try:
        answer = gateway.get("/ready", None)

        assert (answer.status, answer.json["ready"], bool(answer.json["causes"])) == (503, False, True)
        assert int(answer.headers["retry-after"]) >= 1
        refusal = gateway.chat()
        assert (refusal.status, refusal.code) == (503, "no_backend")
        assert int(refusal.headers["retry-after"]) >= 1
    finally:
        gateway.__exit__()


def test_a_body_above_the_limit_is_refused(engine: VllmDouble):
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY="engine-secret", MAX_BODY_BYTES=2048) as gateway:
        answer = gateway.chat("x" * 4000)

        assert (answer.status, answer.code) == (413, "request_too_large")
        assert "2048" in answer.json["error"]["message"]
        assert gateway.chat("x").status == 200
