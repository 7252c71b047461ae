"""Bodies: what the gateway reads of them, and what the engine gets."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.wire import ENDPOINTS, STRIPPED, Caps, parse, payload

CHAT = ENDPOINTS["/v1/chat/completions"]
CAPS = Caps()


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def sent(raw: bytes, endpoint: Any = CHAT, served: str = "m", limit: int | None = None) -> dict[str, Any]:
    request = parse(endpoint, raw, CAPS)
    if limit is not None:
        request.output_limit = limit
    return json.loads(payload(request, served))


def test_unknown_fields_travel_and_internal_ones_do_not():
    internal = dict.fromkeys(STRIPPED, 1)

    body = sent(chat(temperature=0.5, chat_template_kwargs={"enable_thinking": False}, **internal))

    assert body == json.loads(chat(temperature=0.5, chat_template_kwargs={"enable_thinking": False}))


def test_a_field_that_stands_twice_is_read_and_sent_once():
    raw = b'{"model":"a","n":1,"model":"b","messages":[],"n":2}'

    request = parse(CHAT, raw, CAPS)

    assert (request.model, request.n) == ("b", 2)
    assert json.loads(payload(request, "b"), object_pairs_hook=list) == [
        ["model", "b"],
        ["n", 2],
        ["messages", []],
    ] or (json.loads(payload(request, "b")) == {"model": "b", "n": 2, "messages": []})


def test_usage_is_asked_for_on_every_stream_and_the_callers_options_are_kept():
    body = sent(chat(stream=True, stream_options={"include_usage": False, "other": [1]}))

    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True, "other": [1]}


@pytest.mark.parametrize(("options", "usage", "running"), [
    (None, False, False),
    ({"include_usage": True}, True, False),
    ({"continuous_usage_stats": True}, False, False),
    ({"include_usage": True, "continuous_usage_stats": True}, True, True),
])  # fmt: skip
def test_what_the_caller_asked_for_is_remembered(options: Any, usage: bool, running: bool):
    request = parse(CHAT, chat(stream=True, stream_options=options), CAPS)

    assert (request.wants_usage, request.wants_running_usage) == (usage, running)


@pytest.mark.parametrize(("fields", "name"), [
    ({"max_tokens": 9}, "max_tokens"),
    ({"max_completion_tokens": 9}, "max_completion_tokens"),
    ({"max_tokens": 8, "max_completion_tokens": 9}, "max_completion_tokens"),
    ({}, "max_completion_tokens"),
])  # fmt: skip
def test_the_budgets_limit_replaces_the_field_that_counts(fields: Any, name: str):
    assert sent(chat(**fields), limit=3)[name] == 3


@pytest.mark.parametrize(("fields", "param"), [
    ({"n": 9}, "n"), ({"n": 0}, "n"), ({"best_of": 9}, "best_of"), ({"top_logprobs": 21}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"n": "x"}, "n"),
    ({"stream": "yes"}, "stream"), ({"model": ""}, "model"), ({"model": 7}, "model"),
])  # fmt: skip
def test_what_is_out_of_bounds_is_refused_by_name(fields: Any, param: str):
    with pytest.raises(InvalidRequest) as refusal:
        parse(CHAT, chat(**fields), CAPS)

    assert param == refusal.value.param


def test_a_whole_number_may_be_written_as_a_float_as_vllm_takes_it():
    body = sent(chat(max_tokens=100.0, n=2e0, top_logprobs=5, temperature=0.5))

    assert (body["max_tokens"], body["n"], body["temperature"]) == (100, 2, 0.5)
    assert all(type(body[name]) is int for name in ("max_tokens", "n", "top_logprobs"))


@pytest.mark.parametrize("value", [2.5, 1e30, -1.0, 9.0, "2.0"])
def test_no_other_float_is_an_integer_in_bounds(value: Any):
    with pytest.raises(InvalidRequest):
        parse(CHAT, chat(n=value), CAPS)


def test_a_prompt_may_be_echoed_alone():
    endpoint = ENDPOINTS["/v1/completions"]
    raw = b'{"model":"m","prompt":"a","max_tokens":0,"echo":true,"logprobs":0}'

    assert parse(endpoint, raw, CAPS).output_tokens == 1  # which the engine computes and counts
    assert sent(raw, endpoint)["max_tokens"] == 0
    for other in (b'{"model":"m","prompt":"a","max_tokens":0}', raw.replace(b"true", b"1")):
        with pytest.raises(InvalidRequest):
            parse(endpoint, other, CAPS)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"null", b'"x"', b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_json_object_is_refused(raw: bytes):
    with pytest.raises(InvalidRequest):
        parse(CHAT, raw, CAPS)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=30,
))  # fmt: skip
def test_any_json_is_either_refused_or_understood(value: Any):
    raw = json.dumps(value).encode()
    for endpoint in ENDPOINTS.values():
        try:
            request = parse(endpoint, raw, CAPS)
        except InvalidRequest:
            continue
        assert request.prompt_bound >= request.prompt_estimate > 0


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS.values() if not e.multipart], ids=lambda e: e.name)
def test_random_fields_never_crash(endpoint: Any):
    for extra in (
        {"input": [[1, 2], [3]]},
        {"input": ["a"] * 3},
        {"prompt": ["a", "b"]},
        {"input": {"a": 1}},
        {"n": None},
    ):
        parse(endpoint, json.dumps({"model": "m", **extra}).encode(), CAPS)


def test_completions_count_a_sequence_for_each_prompt():
    endpoint = ENDPOINTS["/v1/completions"]

    assert parse(endpoint, b'{"model":"m","prompt":["a","b","c"],"n":2}', CAPS).n == 6
    assert parse(endpoint, b'{"model":"m","prompt":[1,2,3]}', CAPS).n == 1
    assert parse(endpoint, b'{"model":"m","prompt":"a"}', CAPS).output_tokens == 16


@pytest.mark.parametrize("url", [
    "http://h/x.png", "HTTPS://h/x", " http://h", "file:///etc/passwd", "ftp://h", "//h/x", "\\\\h\\x", "gopher://h",
])  # fmt: skip
@pytest.mark.parametrize("shape", ["image_url", "nested", "escaped", "anthropic", "responses"])
def test_media_from_elsewhere_is_refused(url: str, shape: str):
    text = json.dumps(url)
    content = {
        "image_url": f'[{{"type":"image_url","image_url":{{"url":{text}}}}}]',
        "nested": f'[{{"type":"tool_result","content":[{{"video_url":{text}}}]}}]',
        "escaped": f'[{{"\\u0069mage_url":{text}}}]',
        "anthropic": f'[{{"type":"image","source":{{"type":"url","url":{text}}}}}]',
        "responses": f'[{{"type":"input_image","image_url":{text}}}]',
    }[shape]
    field = "input" if shape == "responses" else "messages"
    endpoint = ENDPOINTS[{"responses": "/v1/responses", "anthropic": "/v1/messages"}.get(shape, "/v1/chat/completions")]
    raw = f'{{"model":"m","{field}":[{{"role":"user","content":{content}}}]}}'.encode()

    with pytest.raises(InvalidRequest):
        parse(endpoint, raw, CAPS)


def test_inline_media_is_counted_apart_from_text():
    url = "data:image/png;base64," + "A" * 100_000
    raw = chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])

    request = parse(CHAT, raw, CAPS)

    assert request.media == 1
    assert CAPS.media_tokens < request.prompt_bound < CAPS.media_tokens + 500


def test_stored_answers_are_not_offered():
    endpoint = ENDPOINTS["/v1/responses"]

    assert sent(b'{"model":"m","input":"x","store":true}', endpoint)["store"] is False
    for field in ('"background":true', '"previous_response_id":"resp_1"'):
        with pytest.raises(InvalidRequest):
            parse(endpoint, f'{{"model":"m","input":"x",{field}}}'.encode(), CAPS)


@given(st.text(min_size=0, max_size=400))
def test_the_prompts_bound_is_no_less_than_its_bytes(text: str):
    request = parse(CHAT, chat(messages=[{"role": "user", "content": text}]), CAPS)

    assert request.prompt_bound >= len(text.encode("utf-8", "surrogatepass"))
