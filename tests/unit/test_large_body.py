"""Large bodies: what is set aside changes nothing, and nothing that is done with a large body takes long at once."""

import asyncio
import gc
import io
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from werkzeug.formparser import FormDataParser

from gateway import multipart
from gateway.errors import InvalidRequest
from gateway.large_body import LEAD_BYTES, Aside, LargeBodies, find
from gateway.wire import ENDPOINTS, STRIPPED, Caps, Request, parse, payload

CAPS = Caps()
CHAT = ENDPOINTS["/v1/chat/completions"]
TRANSCRIPTIONS = ENDPOINTS["/v1/audio/transcriptions"]
STRETCH, PIECE = 700, 128
MEGABYTE = 1_048_576


def steps(work: Coroutine[Any, Any, Any]) -> tuple[Any, list[float]]:
    """Run a coroutine that only gives others their turn; its result, and the processor seconds of each step."""
    seconds = []
    while True:
        began = time.thread_time()
        try:
            work.send(None)
        except StopIteration as done:
            return done.value, [*seconds, time.thread_time() - began]
        finally:
            seconds.append(time.thread_time() - began)


def cut(raw: bytes) -> Aside:
    return Aside(raw, steps(find(raw, STRETCH, PIECE))[0])


def told(do: Callable[[], Request]) -> dict[str, Any]:
    """Everything that is known of a request, and what the engine would get; or why it is refused."""
    try:
        request = do()
    except InvalidRequest as refusal:
        return {"refused": str(refusal), "param": refusal.param}
    known = {name: getattr(request, name) for name in Request.__slots__ if name not in ("fields", "aside", "raw")}
    request.output_limit = 7
    body = payload(request, "served")
    return {**known, "names": list(request.fields), "payload": body if isinstance(body, bytes) else b"".join(body)}


# Texts long enough to be cut, with everything near their borders that could end, begin or hide something.
ODD = st.sampled_from(
    ["", '\\"', "\\\\", "\\u0041", "\\/", "\\ud83d\\ude00", "é", "🙂", "\\n", " ", "~", "A", "0", "\\\\\\/"]
)
PLAIN = st.tuples(
    st.sampled_from(["A", "0", "a1", "http:", "data:", "[1,", "\\/", "A\\/", " "]), st.integers(1, 2200)
).map(lambda pair: (pair[0] * pair[1])[:2200].removesuffix("\\"))
TEXT = st.lists(ODD | PLAIN, max_size=5).map("".join)
QUOTED = TEXT.map(lambda text: f'"{text}"')
SCALAR = st.sampled_from(["1", "true", "null", "-1.5e3", '""']) | QUOTED
SPACE = st.sampled_from(["", " ", " " * 1500, "\n\t"])
NAME = st.sampled_from(['"image_url"', '"url"', '"text"', '"content"', '"a"', '"\\u0069mage"'])
VALUE = st.recursive(
    SCALAR | st.lists(st.sampled_from(["1", "22", "333"]), max_size=800).map(lambda n: f"[{','.join(n)}]"),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(NAME, inner), max_size=3).map(lambda o: "{" + ",".join(f"{n}:{v}" for n, v in o) + "}")
    ),
    max_leaves=6,
)
FIELD = st.sampled_from(
    ["model", "messages", "input", "prompt", "stream", "stream_options", "tools", "n", "max_tokens", "system", "user",
     "priority", "documents", "query"]
)  # fmt: skip
OBJECT = st.lists(st.tuples(FIELD, VALUE, SPACE), max_size=5).map(
    lambda fields: "{" + ",".join(f'{space}"{name}":{space}{value}' for name, value, space in fields) + "}"
)
WHOLE = OBJECT.map(lambda body: body.replace("{", '{"model":"m"' + ("," if body != "{}" else ""), 1).encode())
BROKEN = st.tuples(WHOLE, st.integers(0, 5000), st.sampled_from([b"", b"\x01", b"\xff", b'"', b"\\", b"]", b"x"])).map(
    lambda mutation: mutation[0][: mutation[1]] + mutation[2] + mutation[0][mutation[1] + 1 :]
)


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
@given(raw=WHOLE | BROKEN)
@example(
    raw=b'{"model":"m","messages":[{"image_url":{"url":"'
    + b"A" * 5000
    + b'"}},{"image":"http://x/'
    + b"B" * 5000
    + b'"}]}'
)
@example(raw=b'{"model":"' + b"A" * 5000 + b'"}')
@example(raw=b'{"model":"m","prompt":"' + b"\\" * 1 + b"A" * 5000 + b'"}')
def test_a_body_means_the_same_with_and_without_what_was_set_aside(endpoint: str, raw: bytes):
    aside = cut(raw)

    assert b"".join(aside.restore(aside.rest)) == raw
    with_all = told(lambda: parse(ENDPOINTS[endpoint], raw, CAPS))
    with_rest = told(lambda: parse(ENDPOINTS[endpoint], raw, CAPS, aside))
    if aside.touches(with_rest.get("model", "")):
        del with_rest["model"], with_all["model"]  # a name of a megabyte, which nobody serves
    if b"\\/" in raw:  # a slash that is written with two bytes counts as media with both
        for name in ("prompt_bound", "prompt_estimate"):
            assert with_rest.pop(name, 0) <= with_all.pop(name, 0)
    assert with_rest == with_all


@given(
    before=st.sampled_from(["", "\\", "é", "\\u00e", '\\"', "\\\\"]),
    letter=st.sampled_from(["A", "\\/", "A\\/"]),
    count=st.integers(400, 3000),
    after=st.sampled_from(["", "\\n", "\\\\", '\\"', "é"]),
)
def test_a_long_text_is_found_wherever_it_lies(before: str, letter: str, count: int, after: str):
    raw = f'{{"model":"m","prompt":"{before}{letter * count}{after}"}}'.encode()

    aside = cut(raw)

    if len(letter) * count >= 2 * STRETCH + LEAD_BYTES:
        assert len(aside.rest) < 2 * STRETCH + LEAD_BYTES + 150
    assert b"".join(aside.restore(aside.rest)) == raw


def test_numbers_and_space_are_never_taken_for_text():
    for inner in ("1," * 3000 + "1", " " * 6000 + "1", "true,false,null," * 600 + "1"):
        assert steps(find(f'{{"input":[{inner}]}}'.encode(), STRETCH, PIECE))[0] == []


def test_a_placeholder_of_another_body_is_just_text():
    other = cut(b'{"a":"' + b"A" * 5000 + b'"}')
    raw = other.rest

    assert cut(raw).restore(raw) == [raw]


def image_body(pictures: int, **fields: Any) -> bytes:
    picture = "data:image/png;base64," + "iVBORw0KGgoAAAANSUhEUgAAAAE/+" * (20 * MEGABYTE // 29 // pictures)
    parts = [{"type": "image_url", "image_url": {"url": picture}} for _ in range(pictures)]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}], **fields}).encode()


@pytest.mark.parametrize("written", ["python", "php"])
def test_nothing_that_is_done_with_20_megabytes_of_images_takes_long_at_once(written: str):
    """Seconds of this thread's processor time, so that the rest of the machine does not matter; and the best of some
    tries, because a virtual processor's time also passes while its host is busy."""
    raw = image_body(4, priority=1, stream=True)
    if written == "php":
        raw = raw.replace(b"/", b"\\/")

    async def whole() -> list[bytes | memoryview]:
        request = await LargeBodies().parse(CHAT, raw, CAPS)
        assert request.media == 4
        assert request.parsed_bytes < MEGABYTE
        return payload(request, "served")  # type: ignore[return-value]

    longest = []
    gc.disable()  # the collector's pauses are those of the tests' own many objects
    try:
        while len(longest) < 5 and not (longest and min(longest) < 0.020):
            body, seconds = steps(whole())
            longest.append(max(seconds))
    finally:
        gc.enable()

    assert len(seconds) > 20
    assert min(longest) < 0.020, longest
    assert not STRIPPED & set(json.loads(b"".join(body)))
    assert json.loads(b"".join(body))["messages"] == json.loads(raw)["messages"]


async def test_others_have_their_turn_while_several_large_bodies_are_read():
    raw = image_body(2)
    bodies = LargeBodies()
    reading = [asyncio.create_task(bodies.parse(CHAT, raw, CAPS)) for _ in range(3)]
    turns = 0
    while not all(task.done() for task in reading):
        await asyncio.sleep(0)
        turns += 1

    assert turns > 3 * 100
    assert {task.result().media for task in reading} == {2}


async def test_a_name_that_was_set_aside_is_refused():
    with pytest.raises(InvalidRequest, match="name is too long"):
        await LargeBodies().parse(CHAT, b'{"model":"m","' + b"A" * 2 * MEGABYTE + b'":1}', CAPS)


async def test_a_body_that_is_large_by_its_structure_is_parsed_as_ever():
    numbers = list(range(300_000))
    raw = json.dumps({"model": "m", "prompt": numbers}).encode()

    request = await LargeBodies().parse(ENDPOINTS["/v1/completions"], raw, CAPS)

    assert request.aside is None
    assert json.loads(payload(request, "m"))["prompt"] == numbers  # type: ignore[arg-type]


FORM = st.lists(
    st.tuples(
        st.sampled_from(["model", "stream", "language", "file", "priority"]),
        st.booleans(),
        st.lists(
            st.sampled_from([b"m", b"true", b"\r\n", b"--cut", b"\r\n--cu", b"\r\n--cut--y", b"x" * 50, b"y" * 3000]),
            max_size=3,
        ).map(b"".join),
    ),
    max_size=4,
)


def read_by_another(request: multipart.Form) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """Fields and files of the form that the engine gets."""
    length = len(request.raw)
    _, fields, files = FormDataParser(lambda **_: io.BytesIO()).parse(io.BytesIO(request.raw), "multipart/form-data", length, {
        "boundary": request.content_type.partition("boundary=")[2]
    })  # fmt: skip
    return {name: fields.getlist(name) for name in fields}, {name: files[name].read() for name in files}


@given(parts=FORM, end=st.sampled_from([b"--cut--\r\n", b"--cut--", b"--cut", b""]), piece=st.integers(1, 80))
def test_the_engines_form_means_what_was_checked(parts: list[tuple[str, bool, bytes]], end: bytes, piece: int):
    raw = b""
    for name, is_file, data in parts:
        head = f'--cut\r\nContent-Disposition: form-data; name="{name}"' + ('; filename="a"' if is_file else "")
        raw += head.encode() + b"\r\n\r\n" + data + b"\r\n"
    raw += end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multipart, "SEARCH_BYTES", piece)
        try:
            request = multipart.parse(TRANSCRIPTIONS, raw, "multipart/form-data; boundary=cut", CAPS)
        except InvalidRequest:
            return
    fields, files = read_by_another(request)
    assert fields["model"] == [request.model]
    assert "priority" not in fields
    assert list(files) == ["file"]


def test_20_megabytes_of_sound_are_searched_with_pauses_and_travel_as_they_came():
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    tail = b'\r\n--cut\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--cut--\r\n'
    raw = head + bytes(20 * MEGABYTE) + tail

    request = multipart.parse(TRANSCRIPTIONS, raw, "multipart/form-data; boundary=cut", CAPS)

    assert request.model == "m"
    assert read_by_another(request) == ({"model": ["m"]}, {"file": bytes(20 * MEGABYTE)})


@pytest.mark.parametrize("inside", [b'"\xff"', b"1e999", b'{"\xff":1}'])
def test_what_only_a_full_look_finds_wrong_is_refused(inside: bytes):
    raw = b'{"model":"m","messages":[{"content":' + inside + b'},{"image_url":"data:x"}]}'

    with pytest.raises(InvalidRequest):
        parse(CHAT, raw, CAPS)
