"""Rerank and score: the bound of a prompt is one, whatever is repeated for every document."""

import json
from typing import Any

import pytest

from gateway.call import Caller
from gateway.large_body import Aside, find
from gateway.stages.estimate import Outputs, ask
from gateway.wire import ENDPOINTS, Caps, Request, parse

QUERY, PART = "word " * 800, "sentence " * 30
RERANK, SCORE = "/v1/rerank", "/v1/score"
MANY = [PART] * 200
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}


def read(path: str, **fields: Any) -> Request:
    return parse(ENDPOINTS[path], json.dumps({"model": "m", **fields}).encode(), Caps())


@pytest.mark.parametrize(("path", "fields"), [
    (RERANK, {"query": QUERY, "documents": MANY}),
    (RERANK, {"query": {"content": [{"type": "text", "text": QUERY}]}, "documents": MANY}),
    (RERANK, {"query": "", "instruction": QUERY, "documents": MANY}),
    (RERANK, {"query": "", "chat_template_kwargs": {"instruction": QUERY}, "documents": MANY}),
    (SCORE, {"text_1": QUERY, "text_2": MANY}),
    (SCORE, {"text_1": [QUERY], "text_2": MANY}),
    (SCORE, {"queries": QUERY, "documents": MANY}),
    (SCORE, {"queries": [QUERY], "items": MANY}),
    (SCORE, {"data_1": [{"content": [{"type": "text", "text": QUERY}]}], "data_2": MANY}),
])  # fmt: skip
def test_what_belongs_to_every_pair_counts_for_every_pair(path: str, fields: dict[str, Any]):
    request = read(path, **fields)

    bytes_of_pairs = 200 * (len(QUERY) + len(PART))
    assert request.prompt_bound >= bytes_of_pairs
    assert request.prompt_bound < 1.1 * bytes_of_pairs
    assert request.prompt_estimate == pytest.approx(bytes_of_pairs / 4, rel=0.05)


@pytest.mark.parametrize(
    "names", [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_a_query_with_a_document_of_its_own_is_read_once(names: tuple[str, str]):
    request = read(SCORE, **{names[0]: [QUERY] * 50, names[1]: MANY[:50]})

    assert 50 * (len(QUERY) + len(PART)) <= request.prompt_bound < 1.1 * 50 * (len(QUERY) + len(PART))


def test_an_image_beside_the_documents_is_an_image_for_each():
    request = read(RERANK, query={"content": [IMAGE]}, documents=MANY)

    assert 200 * (4096 + len(PART)) < request.prompt_bound < 1.1 * 200 * (4096 + len(PART))


async def test_a_large_query_counts_the_same_when_it_was_set_aside():
    fields = {"query": "plain " * 300_000, "documents": ["a", "b", "c"]}
    raw = json.dumps({"model": "m", **fields}).encode()
    aside = Aside(raw, await find(raw))
    assert len(aside.rest) < len(raw) / 2

    request = parse(ENDPOINTS[RERANK], raw, Caps(), aside)

    assert request.prompt_bound == read(RERANK, **fields).prompt_bound >= 3 * 1_800_000


def test_no_text_of_a_pair_is_longer_than_the_context_and_they_may_be_read_apart():
    request = read(RERANK, query="x" * 10_000, documents=["y" * 10_000] * 10)

    wanted = ask(request, Caller("k", "k"), Outputs(256, 0), 512)

    assert wanted.most == 10 * 2 * 512
    assert wanted.likely <= wanted.most
