"""Answers: streams stay byte for byte what the engine sent, less what only the gateway asked for."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answer import BrokenStream, Stream
from gateway.call import Usage
from gateway.errors import KeyDisabled, UpstreamError
from gateway.reported import Search, note_body
from gateway.wire import ENDPOINTS, Caps, parse


def request(path: str = "/v1/chat/completions", **fields: Any) -> Any:
    return parse(ENDPOINTS[path], json.dumps({"model": "m", "stream": True, **fields}).encode(), Caps())


def event(data: dict[str, Any] | str, name: str = "") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def chunk(text: str | None, usage: tuple[int, int] | None, index: int = 0, choices: bool = True) -> bytes:
    delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
    data: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": []}
    if choices:
        data["choices"] = [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]
    if usage is not None:
        prompt, completion = usage
        data["usage"] = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion,
                         "prompt_tokens_details": {"cached_tokens": 2}}  # fmt: skip
    return event(data)


DONE = b"data: [DONE]\n\n"


def relay(stream: Stream, data: bytes, cuts: list[int]) -> bytes:
    """Feed `data` cut at `cuts`; what came out, with the terminal event at the end."""
    out, at = b"", 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        if cut > at:
            out += stream.feed(data[at:cut])
            at = cut
    return out + stream.tail


@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
@given(
    texts=st.lists(st.text(max_size=20) | st.sampled_from(['"usage":{"a":1}', "data: [DONE]\n\n", '"choices":[]', "\\"]),
                   max_size=6),
    cuts=st.lists(st.integers(0, 3000), max_size=8),
)  # fmt: skip
def test_a_healthy_stream_is_what_the_engine_would_have_sent(options: Any, texts: list[str], cuts: list[int]):
    every = [None, *texts]
    got = (
        b"".join(chunk(text, (7, i)) for i, text in enumerate(every)) + chunk("", (7, len(texts)), choices=False) + DONE
    )
    running = bool(options and options.get("continuous_usage_stats"))
    wanted = b"".join(chunk(text, (7, i) if running else None) for i, text in enumerate(every))
    if options:
        wanted += chunk("", (7, len(texts)), choices=False)
    stream = Stream(request(stream_options=options), Usage())

    assert relay(stream, got, cuts) == wanted + DONE
    assert stream.ended
    assert (stream.usage.prompt, stream.usage.completion, stream.usage.cached) == (7, len(texts), 2)


@given(
    together=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    running=st.booleans(),
    breaks=st.booleans(),
    data=st.data(),
)
def test_events_that_come_whole_are_what_they_are_in_pieces(
    together: list[int], running: bool, breaks: bool, data: Any
):
    """One event a read is the usual case and has a way of its own: it must not differ from any other cut."""
    options = {"include_usage": True, "continuous_usage_stats": True} if running else None
    count = sum(together)
    events = [chunk(None, (7, 0)), *(chunk(f"t{i}", (7, i)) for i in range(1, count))]
    end = [event('{"error":{"message":"x"}}')] if breaks else [chunk("", (7, count), choices=False), DONE]
    sent = b"".join([*events, *end])
    cuts = data.draw(st.lists(st.integers(0, len(sent)), max_size=12))

    def fed(pieces: list[bytes]) -> tuple[bytes, Any]:
        stream, out = Stream(request(stream_options=options), Usage()), b""
        try:
            for piece in pieces:
                out += stream.feed(piece)
        except BrokenStream as broken:
            return out + broken.before, stream.usage
        return out + stream.tail, stream.usage

    whole = []
    for number in together:
        whole.append(b"".join(events[:number]))
        events = events[number:]
    at = [0, *sorted(cuts), len(sent)]
    assert fed([*whole, *end]) == fed([sent[a:b] for a, b in itertools.pairwise(at) if b > a])


def test_an_answer_cut_at_its_limit_ends_there_also_among_whole_events():
    stream = Stream(request(), Usage(), 10)
    got = stream.feed(chunk(None, (7, 0))) + stream.feed(b"".join(chunk(f"t{i}", (7, i)) for i in range(1, 9)))
    assert got.count(b'"content":"t') == 3
    assert stream.ended
    assert stream.cut
    assert stream.usage.total == 10


@given(newline=st.sampled_from(["\n", "\r\n"]), cuts=st.lists(st.integers(0, 3000), max_size=8), usage=st.booleans())
def test_an_engine_with_a_looser_hand_is_read_as_well(newline: str, cuts: list[int], usage: bool):
    """Spaces in the JSON, lines ending in CRLF, usage only at the end, as servers other than vLLM write."""

    def loose(data: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(data)}{newline}{newline}".encode()

    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in ("a", "", "b")]
    last = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}}
    sent = b"".join(map(loose, chunks)) + (loose(last) if usage else b"") + f"data: [DONE]{newline}{newline}".encode()
    stream = Stream(request(), Usage())

    got = relay(stream, sent, cuts)

    assert got == b"".join(map(loose, chunks)).replace(b"\r\n", b"\n") + DONE
    assert stream.tokens
    assert (stream.usage.prompt, stream.usage.completion) == ((9, 4) if usage else (0, 2))


@given(
    limit=st.integers(8, 40),
    cuts=st.lists(st.integers(0, 6000), max_size=8),
    wanted=st.booleans(),
    running=st.booleans(),
)
def test_an_engine_that_goes_on_after_its_limit_is_cut_there(limit: int, cuts: list[int], wanted: bool, running: bool):
    sent = chunk(None, (7, 0) if running else None)
    sent += b"".join(chunk(f"t{i} ", (7, i) if running else None) for i in range(1, 50))
    stream = Stream(request(stream_options={"include_usage": True} if wanted else None), Usage(), limit)

    got = relay(stream, sent, cuts)

    *events, done, rest = got.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    said = [json.loads(event.removeprefix(b"data: ")) for event in events]
    text = "".join(c["delta"].get("content", "") for event in said for c in event["choices"])
    tokens = limit - (7 if running else 0)
    assert text == "".join(f"t{i} " for i in range(1, tokens + 1))
    assert [c["finish_reason"] for event in said for c in event["choices"]][-1] == "length"
    assert stream.cut
    assert stream.usage.total == limit
    if wanted:
        assert said[-1]["usage"]["total_tokens"] == limit


def test_the_role_chunk_is_not_the_first_token():
    stream = Stream(request(), Usage())

    stream.feed(chunk(None, (7, 0)))
    assert not stream.tokens
    stream.feed(chunk("x", (7, 1)))
    assert stream.tokens


def test_several_choices_are_added_up_while_they_run():
    stream = Stream(request(n=2), Usage())

    stream.feed(chunk("a", (7, 1), 0) + chunk("b", (7, 1), 1) + chunk("c", (7, 2), 1))
    assert (stream.usage.prompt, stream.usage.completion) == (7, 3)
    stream.feed(chunk("", (7, 9), choices=False))
    assert stream.usage.completion == 9


def test_several_prompts_are_added_up_while_they_run():
    stream = Stream(request("/v1/completions", prompt=["a", "b"], n=2), Usage())

    stream.feed(chunk("a", (7, 1), 0) + chunk("b", (7, 1), 1) + chunk("c", (5, 2), 2))

    assert (stream.usage.prompt, stream.usage.completion) == (12, 4)


def test_the_engines_fingerprint_moves_to_the_event_that_is_now_the_last():
    finish = {"id": "c", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}]}
    usage = {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1}
    last = {"id": "c", "choices": [], "usage": usage, "system_fingerprint": "vllm-x"}
    data = event({**finish, "usage": usage}) + event(last) + DONE

    for cut in range(1, len(data)):
        stream = Stream(request(), Usage())
        assert relay(stream, data, [cut]) == event({**finish, "system_fingerprint": "vllm-x"}) + DONE

    stream = Stream(request(), Usage())
    assert relay(stream, event({**finish, "usage": usage}) + DONE, []) == event(finish) + DONE


@pytest.mark.parametrize("before", [b"", chunk("a", (7, 1))])
def test_the_engines_error_event_ends_the_stream_without_its_text(before: bytes):
    stream = Stream(request(), Usage())

    with pytest.raises(BrokenStream) as broken:
        stream.feed(before + event({"error": {"message": "secret at 0xdeadbeef", "code": 500}}) + DONE)

    assert broken.value.before == (chunk("a", None) if before else b"")
    assert b"secret" not in stream.broken(broken.value, "r1")


WHAT_IS_NO_EVENT = {
    "half an object": b'data: {"choices": [{"index": 0\n\n',
    "a text": b"data: Internal Server Error\n\n",
    "a page": b"<html>502 Bad Gateway</html>\n\n",
    "bytes": b"\x00\xff{]\n\n",
}
BEGINNINGS = {
    "/v1/chat/completions": chunk("a", None),
    "/v1/messages": event({"type": "content_block_delta", "delta": {"text": "a"}}, "content_block_delta"),
    "/v1/responses": event({"type": "response.output_text.delta", "delta": "a"}, "response.output_text.delta"),
}


@pytest.mark.parametrize("path", BEGINNINGS)
@pytest.mark.parametrize("what", WHAT_IS_NO_EVENT)
def test_what_is_no_event_breaks_the_stream_and_is_not_passed_on(path: str, what: str):
    for cut in (0, len(BEGINNINGS[path])):
        stream = Stream(request(path), Usage())

        with pytest.raises(BrokenStream) as broken:
            relay(stream, BEGINNINGS[path] + WHAT_IS_NO_EVENT[what] + BEGINNINGS[path], [cut])

        assert broken.value.before == (b"" if cut else BEGINNINGS[path])


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("end", [event({"error": {"message": "secret"}}), DONE], ids=["error", "done"])
def test_an_end_of_the_other_dialect_is_no_end(path: str, end: bytes):
    stream = Stream(request(path), Usage())

    with pytest.raises(BrokenStream) as broken:
        stream.feed(BEGINNINGS[path] + end)

    assert broken.value.before == BEGINNINGS[path]
    assert not stream.ended


@pytest.mark.parametrize("path", BEGINNINGS)
@pytest.mark.parametrize("event", [b": ping\n\n", b"event: ping\nid: 7\n\n", b"retry: 3000\n\n"])
def test_comments_and_fields_without_data_pass(path: str, event: bytes):
    stream = Stream(request(path), Usage())
    data = BEGINNINGS[path] + event + BEGINNINGS[path]

    assert stream.feed(data) == data


def test_a_text_that_looks_like_an_error_event_is_a_text():
    stream = Stream(request(), Usage())
    data = chunk('\n\ndata: {"error":{}}', None)

    assert stream.feed(data) == data


def test_nothing_follows_the_terminal_event():
    stream = Stream(request(), Usage())

    assert stream.feed(DONE) == b""
    assert stream.feed(chunk("x", None)) == b""
    assert stream.tail == DONE


def test_an_endless_event_is_refused():
    stream = Stream(request(), Usage())

    def endless() -> None:
        for _ in range(100):
            stream.feed(b"x" * 100_000)

    with pytest.raises(UpstreamError):
        endless()


MESSAGES = (
    event(
        {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 9, "output_tokens": 0}}},
        "message_start",
    )
    + event({"type": "content_block_delta", "delta": {"text": "a"}}, "content_block_delta")
    + event({"type": "content_block_delta", "delta": {"text": "b"}}, "content_block_delta")
    + event({"type": "message_delta", "usage": {"input_tokens": 9, "output_tokens": 5}}, "message_delta")
    + event({"type": "message_stop"}, "message_stop")
)
RESPONSES = (
    event({"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1"}}, "response.created")
    + event({"type": "response.output_text.delta", "sequence_number": 1, "delta": "a"}, "response.output_text.delta")
    + event({"type": "response.completed", "sequence_number": 2,
             "response": {"id": "resp_1", "tools": [{"usage": {"x": 1}}],
                          "usage": {"input_tokens": 9, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 1}}}},
            "response.completed")
)  # fmt: skip


@pytest.mark.parametrize(("path", "data"), [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)])
@given(cuts=st.lists(st.integers(0, 700), max_size=6))
def test_other_dialects_pass_unchanged_and_end_at_their_own_event(path: str, data: bytes, cuts: list[int]):
    stream = Stream(request(path), Usage())

    assert relay(stream, data, cuts) == data
    assert stream.ended
    assert (stream.usage.prompt, stream.usage.completion) == (9, 5)


@pytest.mark.parametrize(("path", "data"), [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)])
def test_an_aborted_stream_of_another_dialect_counts_its_deltas(path: str, data: bytes):
    stream = Stream(request(path), Usage())
    mark = b"event: message_delta" if path == "/v1/messages" else b"event: response.completed"

    stream.feed(data[: data.index(mark)])

    assert stream.tokens
    assert stream.usage.completion == (2 if path == "/v1/messages" else 1)
    assert not stream.ended


def test_a_broken_stream_is_told_in_each_dialect():
    error = KeyDisabled("This key was disabled.")
    chat = Stream(request(), Usage()).broken(error, "r1")
    messages = Stream(request("/v1/messages"), Usage()).broken(error, "r1")
    stream = Stream(request("/v1/responses"), Usage())
    stream.feed(RESPONSES[: RESPONSES.index(b"event: response.completed")])
    responses = stream.broken(error, "r1")

    assert json.loads(chat.removeprefix(b"data: "))["error"]["code"] == "key_disabled"
    name, _, data = messages.partition(b"\ndata: ")
    assert name == b"event: error"
    assert json.loads(data)["type"] == "error"
    name, _, data = responses.partition(b"\ndata: ")
    failed = json.loads(data)
    assert name == b"event: response.failed"
    assert (failed["type"], failed["sequence_number"], failed["response"]["id"]) == ("response.failed", 2, "resp_1")


@pytest.mark.parametrize(("body", "tokens"), [
    ({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}, (3, 4)),
    ({"usage": {"prompt_tokens": 3, "total_tokens": 3}}, (3, 0)),
    ({"usage": {"total_tokens": 3}}, (3, 0)),
    ({"usage": {"input_tokens": 3, "output_tokens": 4}}, (3, 4)),
    ({"usage": {"type": "duration", "seconds": 2}}, (100, 0)),
])  # fmt: skip
def test_the_usage_of_a_json_answer(body: Any, tokens: tuple[int, int]):
    whole, large = Usage(), Usage()

    note_body(whole, json.dumps(body).encode())
    Search(large).look(b'"x"]' + json.dumps(body, separators=(",", ":")).encode())

    assert (whole.prompt, whole.completion) == tokens == (large.prompt, large.completion)


@given(
    before=st.integers(0, 200),
    after=st.integers(0, 9000),
    cuts=st.lists(st.integers(0, 9000), max_size=8),
    text=st.sampled_from(['"usage":{"prompt_tokens":900}', '\\"usage":{"total_tokens":900}', "x"]),
    repeated=st.sampled_from([{}, {"prompt_tokens": 0}, {"type": "object"}, {"completion_tokens": 2}]),
)
def test_usage_is_found_wherever_it_stands_and_nobody_makes_it_less(
    before: int, after: int, cuts: list[int], text: str, repeated: Any
):
    used = {"prompt_tokens": 30, "total_tokens": 34, "completion_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 16}}  # fmt: skip
    answer = {"id": "x" * before, "text": text, "a": {"usage": repeated}, "usage": used,
              "results": ["y" * after, text, {"usage": repeated}]}  # fmt: skip
    body = json.dumps(answer).encode()
    usage = Usage()

    search = Search(usage)
    at = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for a, b in itertools.pairwise(at):
        search.look(body[a:b])

    assert usage == Usage(30, 4, 16, True)


@given(st.binary(max_size=200))
def test_an_answer_that_says_nothing_changes_nothing(body: bytes):
    usage = Usage()

    note_body(usage, body)
    Search(usage).look(body)

    assert usage == Usage()


@pytest.mark.parametrize(
    "usage", ['{"prompt_tokens":"many"}', '{"prompt_tokens":1.5}', '{"completion_tokens":[1]}', "{}"]
)
def test_a_usage_that_is_none_breaks_nothing(usage: str):
    said = f'{{"choices":[{{"index":0,"delta":{{"content":"a"}}}}],"usage":{usage}}}'
    stream = Stream(request(stream_options={"include_usage": True, "continuous_usage_stats": True}), Usage())

    assert relay(stream, event(said) + DONE, []) == event(said) + DONE
    assert stream.usage.prompt == 0
