"""The double that stands for vLLM in most tests, against the real vLLM: statuses, fields, events, refusals, metrics.

What is compared is shape: texts, numbers and names differ, fields and their kinds do not.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from tests.doubles.vllm import VllmDouble
from tests.doubles.vllm_openapi import recorded, trimmed

pytestmark = pytest.mark.timeout(1800)  # the first of these tests may wait for the engine's start
ASK = [{"role": "user", "content": "one two three"}]
USAGE = {"include_usage": True}
RUNNING = {"include_usage": True, "continuous_usage_stats": True}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FEW = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = "sea " * 9000  # longer than the model's context

Body = dict[str, Any] | bytes
CASES: dict[str, tuple[str, Body]] = {
    "chat": ("/v1/chat/completions", {"messages": ASK, **FEW}),
    "chat, two choices": ("/v1/chat/completions", {"messages": ASK, "n": 2, **FEW, "temperature": 1}),
    "chat, logprobs": ("/v1/chat/completions", {"messages": ASK, "logprobs": True, "top_logprobs": 2, **FEW}),
    "chat, no model": ("/v1/chat/completions", {"messages": ASK, "model": None, **FEW}),
    "chat, stream": ("/v1/chat/completions", {"messages": ASK, "stream": True, **FEW}),
    "chat, stream, usage": ("/v1/chat/completions", {"messages": ASK, "stream": True, "stream_options": USAGE, **FEW}),
    "chat, stream, running usage": (
        "/v1/chat/completions",
        {"messages": ASK, "stream": True, "stream_options": RUNNING, **FEW},
    ),
    "chat, stream, logprobs": (
        "/v1/chat/completions",
        {"messages": ASK, "stream": True, "logprobs": True, "top_logprobs": 2, **FEW},
    ),
    "chat, stream, tools unused": (
        "/v1/chat/completions",
        {"messages": ASK, "stream": True, "tools": [TOOL], "tool_choice": "none", **FEW},
    ),
    "completions": ("/v1/completions", {"prompt": "one two", **FEW}),
    "completions, prompts": ("/v1/completions", {"prompt": ["one two", "three"], **FEW}),
    "completions, numbers": ("/v1/completions", {"prompt": [1, 2, 3], **FEW}),
    "completions, logprobs": ("/v1/completions", {"prompt": "one two", "logprobs": 2, **FEW}),
    "completions, stream": ("/v1/completions", {"prompt": "one two", "stream": True, **FEW}),
    "completions, stream, running usage": (
        "/v1/completions",
        {"prompt": "one two", "stream": True, "stream_options": RUNNING, **FEW},
    ),
    "completions, stream, logprobs": ("/v1/completions", {"prompt": "one two", "stream": True, "logprobs": 2, **FEW}),
    "responses": ("/v1/responses", {"input": "one two", "max_output_tokens": 4, "temperature": 0, "ignore_eos": True}),
    "responses, stream": (
        "/v1/responses",
        {"input": "one two", "max_output_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True},
    ),
    "messages": ("/v1/messages", {"messages": ASK, **FEW}),
    "messages, stream": ("/v1/messages", {"messages": ASK, "stream": True, **FEW}),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": ASK}),
    "tokenize, prompt": ("/tokenize", {"prompt": "one two three"}),
    "tokenize, messages": ("/tokenize", {"messages": ASK}),
    "detokenize": ("/detokenize", {"tokens": [100, 101]}),
    "unknown route": ("/v1/nothing", {}),
}
GENERATING = {"/v1/chat/completions": {"messages": ASK}, "/v1/completions": {"prompt": "one two"},
              "/v1/responses": {"input": "one two"}, "/v1/messages": {"messages": ASK, "max_tokens": 4}}  # fmt: skip
TOO_LONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": LONG}]},
    "/v1/completions": {"prompt": LONG},
    "/v1/responses": {"input": LONG},
    "/v1/messages": {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4},
}
for path, fields in GENERATING.items():
    CASES[f"{path}, bad model"] = (path, {**fields, "model": "nobody"})
    CASES[f"{path}, bad JSON"] = (path, b'{"model": ')
    CASES[f"{path}, no object"] = (path, b"[1]")
    CASES[f"{path}, nothing"] = (path, {})
    CASES[f"{path}, bad temperature"] = (path, {**fields, "temperature": "warm"})
    CASES[f"{path}, negative temperature"] = (path, {**fields, "temperature": -1})
    CASES[f"{path}, too long"] = (path, TOO_LONG[path])
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    CASES[f"{path}, too much output"] = (path, {**fields, limit: 9000})
    CASES[f"{path}, no output"] = (path, {**fields, limit: 0})
CASES["tokenize, bad model"] = ("/tokenize", {"prompt": "x", "model": "nobody"})
CASES["tokenize, nothing"] = ("/tokenize", {})
CASES["detokenize, nothing"] = ("/detokenize", {})
CASES["detokenize, bad JSON"] = ("/detokenize", b"{")


def ask(port: int, key: str, model: str, path: str, body: Body) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    if isinstance(body, dict):
        named = {"model": model, **body}
        body = json.dumps({name: value for name, value in named.items() if value is not None}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
    try:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("content-type", ""), answer.read()
    finally:
        connection.close()


LITERAL = frozenset(("code", "finish_reason", "object", "param", "role", "status", "stop_reason", "type"))


def shape(value: Any) -> Any:
    """Fields and kinds of a JSON value, and what clients branch on; a list is the set of its entries' shapes."""
    if isinstance(value, dict) and value and set(map(type, value.values())) == {float}:
        return "probabilities by token"
    if isinstance(value, dict):
        return {name: item if name in LITERAL and isinstance(item, str) else shape(item)
                for name, item in value.items()}  # fmt: skip
    if isinstance(value, list):
        return sorted({json.dumps(shape(item), sort_keys=True) for item in value})
    if value is None or isinstance(value, bool | str):
        return type(value).__name__
    return "number"


def shape_of(content_type: str, body: bytes) -> Any:
    """The shape of a JSON answer, or of a stream: its events in order, several alike in a row as one."""
    if not content_type.startswith("text/event-stream"):
        try:
            return shape(json.loads(body))
        except ValueError:
            return "no JSON"
    told = []
    for block in body.removesuffix(b"\n\n").split(b"\n\n"):
        name, _, data = block.rpartition(b"data: ")
        told.append((name.decode(), data.decode() if data == b"[DONE]" else shape(json.loads(data))))
    return [event for event, _ in itertools.groupby(told)]


@pytest.fixture(scope="module")
def double(engine: Any) -> Iterator[VllmDouble]:
    with VllmDouble(api_key=engine.api_key, model=engine.model) as running:
        yield running


@pytest.mark.parametrize("case", CASES)
def test_the_double_answers_in_the_shape_of_the_real_engine(engine: Any, double: VllmDouble, case: str):
    path, body = CASES[case]

    real = ask(int(engine.port), engine.api_key, engine.model, path, body)
    ours = ask(double.port, engine.api_key, engine.model, path, body)

    assert (ours[0], ours[1]) == (real[0], real[1]), (ours, real)
    assert shape_of(*ours[1:]) == shape_of(*real[1:]), (ours[2], real[2])


FAMILY = re.compile(r"^# TYPE (vllm:\S+) (\S+)$", re.MULTILINE)
SERIES = re.compile(r"^(vllm:[a-z_]+)\{([^}]*)\} ", re.MULTILINE)


def metrics(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def series(page: str) -> dict[str, set[str]]:
    """Names of the samples and of their labels."""
    found: dict[str, set[str]] = {}
    for name, labels in SERIES.findall(page):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def test_every_metric_of_the_double_is_one_of_the_real_engine(engine: Any, double: VllmDouble):
    for port in (int(engine.port), double.port):
        assert ask(port, engine.api_key, engine.model, *CASES["chat"])[0] == 200
    real, ours = metrics(int(engine.port)), metrics(double.port)

    assert set(FAMILY.findall(ours)) <= set(FAMILY.findall(real))
    found = series(real)
    assert {name: labels for name, labels in series(ours).items() if found.get(name) != labels} == {}


@pytest.mark.parametrize("path", ["/health", "/version", "/v1/models"])
def test_the_pages_beside_it_are_alike(engine: Any, double: VllmDouble, path: str):
    told = []
    for port in (int(engine.port), double.port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", path, headers={"authorization": f"Bearer {engine.api_key}"})
            answer = connection.getresponse()
            body = answer.read()
            told.append((answer.status, shape(json.loads(body)) if body else ""))
        finally:
            connection.close()
    real, ours = told

    if path == "/v1/models":
        for page in told:
            page[1]["data"] = [{**json.loads(card), "permission": []} for card in page[1]["data"]]
    assert ours == real


def test_the_recorded_description_of_vllms_routes_is_still_true(engine: Any):
    """What random bodies are generated from; `trimmed` of the engine's own `/openapi.json`."""
    version, document = (
        json.loads(urllib.request.urlopen(f"{engine.url}{path}", timeout=60).read())
        for path in ("/version", "/openapi.json")
    )
    now, then = trimmed(document, version=version["version"]), recorded()

    assert then["info"] == now["info"]
    assert {route: then["paths"][route] for route in now["paths"]} == now["paths"]
    assert len(now["paths"]) == 7
    schemas = then["components"]["schemas"]
    assert {name: schemas[name] for name in now["components"]["schemas"]} == now["components"]["schemas"]
