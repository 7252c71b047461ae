"""vLLM's own description of the routes that the gateway relays, as recorded from the real engine.

`tests/golden/vllm-openapi.json` is what `trimmed` makes of `/openapi.json` of a generating and of a pooling engine;
`info.version` is vLLM's. A test on the real engine says when it is no longer true.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).resolve().parents[1] / "golden" / "vllm-openapi.json"
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenize", "/detokenize", "/v1/embeddings", "/v1/score", "/v1/rerank",
)  # fmt: skip
# What says nothing about a body's form.
_DROPPED = frozenset(("description", "title", "examples", "example", "default", "deprecated"))


def trimmed(*documents: dict[str, Any], version: str) -> dict[str, Any]:
    """The relayed routes of `documents` and the schemas that they need; what stands in several is the first's.

    vLLM takes fields that it does not know. Here they are left out: half of what is generated would be such fields.
    """
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for document in documents:
        for route in ROUTES:
            if route in paths or route not in document["paths"]:
                continue
            body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
            schema = _clean(body)
            content = {"application/json": {"schema": schema}}
            answers = {"200": {"description": "an answer"}}
            paths[route] = {"post": {"requestBody": {"required": True, "content": content}, "responses": answers}}
            todo = list(_references(schema))
            while todo:
                name = todo.pop()
                if name not in schemas:
                    schemas[name] = _clean(document["components"]["schemas"][name])
                    todo += _references(schemas[name])
    told = {"title": "Routes of vLLM that are relayed", "version": version}
    return {"openapi": "3.1.0", "info": told, "paths": paths, "components": {"schemas": dict(sorted(schemas.items()))}}


def recorded() -> dict[str, Any]:
    """The recorded description."""
    document: dict[str, Any] = json.loads(RECORDED.read_text())
    return document


def _clean(value: Any, names: bool = False) -> Any:
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {
        name: _clean(item, name in ("properties", "$defs"))
        for name, item in value.items()
        if names or name not in _DROPPED
    }
    if not names and "properties" in kept:
        kept["additionalProperties"] = False
    return kept


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "$ref":
                yield item.rpartition("/")[2]
            else:
                yield from _references(item)
