"""What an answer in one piece is charged, wherever in it the usage stands, and where none is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.doubles.flow_site import PATHS, Wire, ledger
from tests.doubles.gateway import GatewayProcess
from tests.doubles.scripted_engine import ScriptedEngine, event, streamed, whole

ONE = {str(1000 + n): {"logprob": -1.2345678901234567, "rank": n + 1, "decoded_token": " token"} for n in range(21)}
USAGE = {"prompt_tokens": 4000, "total_tokens": 4002, "completion_tokens": 2}
HEAD = {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "hi"}}]}
IMITATION = '"usage":{"prompt_tokens":1,"completion_tokens":0}'


@pytest.fixture(scope="module")
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine(
        logprobs=whole({**HEAD, "usage": USAGE, "prompt_logprobs": [None, *[ONE] * 3999]}),
        rerank=whole({"id": "r", "usage": USAGE, "results": [{"text": IMITATION + "x" * 100_000}] * 50}),
        repeated=whole({"id": "r", "usage": USAGE, "results": [{"usage": {"prompt_tokens": 0}}, "x" * 5_000_000]}),
        silent=whole(HEAD),
        large_and_silent=whole({**HEAD, "more": "x" * 5_000_000}),
        embeddings=whole({"data": ["x" * 8_000_000], "usage": {"prompt_tokens": 70, "total_tokens": 70}}),
    ) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def gateway(engine: ScriptedEngine) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url) as running:
        yield running


def asked(gateway: GatewayProcess, script: str, key: str, path: str = PATHS["chat"], **fields: Any) -> dict[str, Any]:
    """The row of a call that was answered whole."""
    body = {"model": "double", "messages": [{"role": "user", "content": f"script:{script} {'w ' * 2000}"}],
            "max_tokens": 5, "query": "q", "documents": ["a"], "input": "a", **fields}  # fmt: skip
    request_id = f"usage-of-{script}"
    answer = gateway.post(path, body, key=key, x_request_id=request_id)
    assert answer.status == 200, answer.body[:300]
    json.loads(answer.body)
    return ledger(gateway, request_id)


@pytest.fixture
def key(gateway: GatewayProcess) -> str:
    return str(gateway.admin("POST", "/admin/keys", {"name": "q", "daily_tokens": 20_000}).json["secret"])


@pytest.mark.parametrize("script", ["logprobs", "rerank", "repeated"])
def test_usage_before_the_bulk_of_a_large_answer_is_charged(gateway: GatewayProcess, key: str, script: str) -> None:
    row = asked(gateway, script, key)

    assert (row["prompt_tokens"], row["completion_tokens"], row["outcome"]) == (4000, 2, "ok")
    assert gateway.get("/v1/usage", key=key).json["used_tokens"] == 4002


@pytest.mark.parametrize("script", ["silent", "large_and_silent"])
def test_an_answer_that_tells_no_usage_is_charged_what_it_can_have_cost(
    gateway: GatewayProcess, key: str, script: str
) -> None:
    row = asked(gateway, script, key)

    assert row["outcome"] == "ok"
    assert row["completion_tokens"] == 5
    assert 4000 <= row["prompt_tokens"] <= 6000, "the bytes of the prompt"
    assert gateway.get("/v1/usage", key=key).json["held_tokens"] == 0


def test_an_event_that_is_too_long_is_no_way_to_a_prompt_for_nothing(
    gateway: GatewayProcess, engine: ScriptedEngine, key: str
) -> None:
    long = {"id": "c", "choices": [{"index": 0, "text": "x" * 5_000_000, "finish_reason": None}], "usage": USAGE}
    engine.scripts["long"] = streamed([event(long), b"data: [DONE]\n\n"])
    body = {"model": "double", "prompt": f"script:long {'w ' * 2000}", "echo": True, "stream": True}
    answer = gateway.post("/v1/completions", body, key=key, x_request_id="usage-of-long")
    assert b"longer than this service relays" in answer.body

    row = ledger(gateway, "usage-of-long")
    assert (row["outcome"], row["completion_tokens"]) == ("failed", 0)
    assert 4000 <= row["prompt_tokens"] <= 6000, "the bytes of the prompt"


def test_who_leaves_before_the_usage_of_a_large_answer_does_not_have_it_for_nothing(
    gateway: GatewayProcess, key: str
) -> None:
    body = {"model": "double", "input": "script:embeddings"}
    with Wire(gateway.port, PATHS["embeddings"], body, key=key, request_id="usage-left", receive_buffer=4096) as call:
        call.read_until(b"x" * 100_000)
        call.close("rst")

    row = ledger(gateway, "usage-left")
    assert row["outcome"] == "cancelled"
    assert row["prompt_tokens"] >= len("script:embeddings")


CACHED = {"input_tokens": 10, "output_tokens": 2, "cache_read_input_tokens": 990, "cache_creation_input_tokens": 7}


@pytest.mark.parametrize("first", [{"input_tokens": 1007, "output_tokens": 0}, {**CACHED, "output_tokens": 0}])
@pytest.mark.parametrize("stream", [True, False])
def test_what_the_cache_had_of_a_prompt_is_charged_as_prompt(
    gateway: GatewayProcess, engine: ScriptedEngine, stream: bool, first: dict[str, int]
) -> None:
    """In Anthropic's dialect `input_tokens` is what the cache did not have."""
    engine.scripts["cached"] = whole({"id": "m", "type": "message", "content": [], "usage": CACHED})
    if stream:
        engine.scripts["cached"] = streamed(
            [
                event({"type": "message_start", "message": {"id": "m", "usage": first}}, "message_start"),
                event({"type": "content_block_delta", "delta": {"text": "a"}}, "content_block_delta"),
                event({"type": "message_delta", "usage": CACHED}, "message_delta"),
                event({"type": "message_stop"}, "message_stop"),
            ]
        )
    body = {"model": "double", "max_tokens": 10, "messages": [{"role": "user", "content": "script:cached"}]}
    request_id = f"usage-of-cached-{stream}-{first['input_tokens']}"
    assert gateway.post(PATHS["messages"], {**body, "stream": stream}, x_request_id=request_id).status == 200

    row = ledger(gateway, request_id)
    assert (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (1007, 2, 990)
