"""A day's quota and rerank or score: the engine counts the query for every document, and so does the quota."""

from typing import Any

import pytest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.vllm import VllmDouble

QUERY = "word " * 800
DOCUMENTS = ["a"] * 200
COST = 200 * 801
BODIES = [
    ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    ("/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
    ("/v1/score", {"queries": [QUERY], "items": DOCUMENTS}),
]


def new_key(gateway: GatewayProcess, **limits: Any) -> str:
    return str(gateway.admin("POST", "/admin/keys", {"name": "sorter", **limits}).json["secret"])


def used(gateway: GatewayProcess, key: str) -> int:
    return int(gateway.get("/v1/usage", key=key).json["used_tokens"])


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_what_the_engine_counted_is_booked(gateway: GatewayProcess, path: str, body: dict[str, Any]):
    key = new_key(gateway, daily_tokens=2_000_000)

    answer = gateway.post(path, {"model": "double", **body}, key=key)

    assert answer.status == 200, answer.body
    assert answer.json["usage"]["total_tokens"] == COST
    assert used(gateway, key) == COST


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_what_does_not_fit_into_the_day_is_refused(
    gateway: GatewayProcess, engine: VllmDouble, path: str, body: dict[str, Any]
):
    key = new_key(gateway, daily_tokens=20_000)
    before = len(engine.requests())

    answer = gateway.post(path, {"model": "double", **body}, key=key)

    assert (answer.status, answer.code) == (429, "quota_exhausted")
    assert used(gateway, key) == 0
    assert len(engine.requests()) == before


def test_a_usual_one_needs_no_more_of_the_day_than_it_did(gateway: GatewayProcess):
    key = new_key(gateway, daily_tokens=2_000)
    body = {"model": "double", "query": "Which one is about cats?", "documents": ["Cats purr."] * 5}

    answer = gateway.post("/v1/rerank", body, key=key)

    assert answer.status == 200, answer.body
    assert used(gateway, key) == answer.json["usage"]["total_tokens"] == 5 * 7
