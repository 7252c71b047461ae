"""Near the end of a day's quota a prompt is counted by the engine, not bounded by its bytes."""

from typing import Any

import pytest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.vllm import VllmDouble

WORDS = [{"role": "user", "content": "honestly " * 300}]


def new_key(gateway: GatewayProcess, **limits: Any) -> str:
    return str(gateway.admin("POST", "/admin/keys", {"name": "frugal", **limits}).json["secret"])


def ask(gateway: GatewayProcess, path: str, key: str, **fields: Any) -> Any:
    return gateway.post(path, {"model": "double", "max_tokens": 10, **fields}, key=key)


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("/v1/chat/completions", {"messages": WORDS}), ("/v1/completions", {"prompt": "honestly " * 300})],
)
def test_a_call_that_fits_exactly_is_taken_and_the_next_is_not(gateway: GatewayProcess, path: str, prompt: Any):
    """2,700 bytes are many fewer tokens; a quota of just what the call costs carries it whole."""
    cost = ask(gateway, path, new_key(gateway), **prompt).json["usage"]["total_tokens"]
    key = new_key(gateway, daily_tokens=cost)

    first = ask(gateway, path, key, **prompt)
    second = ask(gateway, path, key, **prompt)

    assert first.status == 200, first.body
    assert first.json["usage"]["total_tokens"] == cost == gateway.get("/v1/usage", key=key).json["used_tokens"]
    assert (second.status, second.code) == (429, "quota_exhausted")


def test_a_prompt_longer_than_what_is_left_is_refused(gateway: GatewayProcess):
    key = new_key(gateway, daily_tokens=100)

    answer = ask(gateway, "/v1/chat/completions", key, messages=WORDS)

    assert (answer.status, answer.code) == (429, "quota_exhausted")
    assert gateway.get("/v1/usage", key=key).json["used_tokens"] == 0


def test_a_small_organisation_is_counted_as_exactly(gateway: GatewayProcess):
    cost = ask(gateway, "/v1/chat/completions", new_key(gateway), messages=WORDS).json["usage"]["total_tokens"]
    assert gateway.admin("PATCH", "/admin/organisations/frugal", {"daily_tokens": cost}).status == 200
    key = new_key(gateway, organisation="frugal")

    assert ask(gateway, "/v1/chat/completions", key, messages=WORDS).status == 200
    assert ask(gateway, "/v1/chat/completions", key, messages=WORDS).status == 429


def test_a_wide_quota_asks_the_engine_nothing(gateway: GatewayProcess, engine: VllmDouble):
    key = new_key(gateway, daily_tokens=1_000_000)
    before = sum(request["path"] == "/tokenize" for request in engine.requests())

    assert ask(gateway, "/v1/chat/completions", key, messages=WORDS).status == 200
    assert sum(request["path"] == "/tokenize" for request in engine.requests()) == before
