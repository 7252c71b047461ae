"""No field of any request that vLLM knows is a way around the checks: media from elsewhere, more prompts than allowed."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InvalidRequest
from gateway.media import TEXT_FIELDS
from gateway.wire import ENDPOINTS, STRIPPED, Caps, parse

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "vllm-openapi.json").read_text(encoding="utf-8"))
CAPS = Caps()
REMOTE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/x.png"}}]}]
PROMPTS = ("completions", "embeddings", "rerank", "score")
NO_PROMPTS = ("stop", "bad_words")  # lists of texts that are none


def shapes(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema's alternatives, resolved."""
    while "$ref" in schema:
        schema = GOLDEN["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    inner = [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, [])]
    return [schema, *(shape for part in inner for shape in shapes(part))]


def fields() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Endpoint, field and the field's alternatives, of all that has more than one value."""
    found = {}
    for endpoint in ENDPOINTS.values():
        post = GOLDEN["paths"].get(endpoint.upstream, {}).get("post")
        if post is None:
            continue
        for form in shapes(post["requestBody"]["content"]["application/json"]["schema"]):
            for name, schema in form.get("properties", {}).items():
                kinds = [shape for shape in shapes(schema) if shape.get("type") in ("array", "object")]
                if kinds and name not in STRIPPED:
                    found.setdefault((endpoint.path, name), []).extend(kinds)
    return [(path, name, kinds) for (path, name), kinds in sorted(found.items(), key=lambda item: item[0])]


FIELDS = fields()


def body(name: str, value: Any) -> bytes:
    return json.dumps({"model": "m", name: value}).encode()


@pytest.mark.parametrize(("path", "name"), [
    (path, name) for path, name, _ in FIELDS
    if name not in TEXT_FIELDS and (path, name) != ("/v1/chat/completions", "documents")
])  # fmt: skip
def test_every_field_that_is_not_text_is_looked_through(path: str, name: str):
    with pytest.raises(InvalidRequest):
        parse(ENDPOINTS[path], body(name, REMOTE), CAPS)


@pytest.mark.parametrize("path", [e.path for e in ENDPOINTS.values() if not e.multipart])
@pytest.mark.parametrize("name", ["of_tomorrow", "images", "image_url"])
def test_so_is_a_field_that_nobody_knows_yet(path: str, name: str):
    with pytest.raises(InvalidRequest):
        parse(ENDPOINTS[path], body(name, "http://h/x.png" if name == "image_url" else REMOTE), CAPS)


@pytest.mark.parametrize(("path", "name"), [
    (path, name) for path, name, kinds in FIELDS
    if ENDPOINTS[path].name in PROMPTS and name not in NO_PROMPTS
    for kind in kinds if kind["type"] == "array" and all(s.get("type") != "integer" for s in shapes(kind["items"]))
])  # fmt: skip
def test_every_list_of_prompts_is_bounded(path: str, name: str):
    for prompt in ([{"role": "user", "content": "x"}], [1, 2], "x"):
        with pytest.raises(InvalidRequest):
            parse(ENDPOINTS[path], body(name, [prompt] * 5_000), CAPS)


def test_a_conversation_to_embed_is_one_prompt():
    conversation = [{"role": "user", "content": "x"}] * 300

    assert parse(ENDPOINTS["/v1/embeddings"], body("messages", conversation), CAPS).prompts == 1
    assert parse(ENDPOINTS["/v1/embeddings"], body("messages", [conversation] * 2), CAPS).prompts == 2


@pytest.mark.parametrize("url", ["h2ttp://h", "http2://h/x", "a+b://h", "\x01http://h", "\thttp://h", "http:h"])
def test_places_are_known_by_any_scheme(url: str):
    with pytest.raises(InvalidRequest):
        parse(ENDPOINTS["/v1/chat/completions"], body("messages", [{"content": [{"image_url": url}]}]), CAPS)


def test_base64_may_begin_with_slashes():
    part = {"type": "input_audio", "input_audio": {"data": "//uQxAAA", "format": "mp3"}}

    assert parse(ENDPOINTS["/v1/chat/completions"], body("messages", [{"content": [part]}]), CAPS).media == 1
