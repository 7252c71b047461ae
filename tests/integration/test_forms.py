"""Forms: what is checked is what the engine gets, whatever two parsers would make of the caller's bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.doubles.gateway import Answer, GatewayProcess
from tests.doubles.vllm import VllmDouble

TYPE = "multipart/form-data; boundary=AAA"


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url) as running:
        yield running


def part(name: str, value: str, more: str = "", boundary: str = "AAA") -> str:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


FILE = part("file", "RIFF", '; filename="a.wav"')
MODEL = part("model", "double")
END = "--AAA--\r\n"
INNER = part("model", "secret", boundary="BBB") + part("n", "500", boundary="BBB") + "--BBB--\r\n"


def transcribe(gateway: GatewayProcess, form: str, content_type: str = TYPE) -> Answer:
    return gateway.request("POST", "/v1/audio/transcriptions", form.encode(), content_type=content_type)


TWO_MEANINGS = {
    "a boundary in another parameter": (INNER + MODEL + FILE + END, "multipart/form-data; xboundary=AAA; boundary=BBB"),
    "two boundaries": (MODEL + FILE + END, "multipart/form-data; boundary=BBB; boundary=AAA"),
    "a boundary inside quotes": (MODEL + FILE + END, 'multipart/form-data; a="; boundary=AAA; "; boundary=BBB'),
    "no boundary": (MODEL + FILE + END, "multipart/form-data; xboundary=AAA"),
    "another type": (MODEL + FILE + END, "multipart/form-data2; boundary=AAA"),
    "something before the first part": ("x\r\n" + MODEL + FILE + END, TYPE),
    "a part without an end": (MODEL + FILE, TYPE),
    "a delimiter that goes on": (MODEL.replace("--AAA", "--AAAB", 1) + FILE + END, TYPE),
    "a part without a name": (MODEL + FILE + part("x", "y").replace('name="x"', "a=b") + END, TYPE),
    "two descriptions": (
        MODEL + FILE + part("x", "y", '\r\nContent-Disposition: form-data; name="model"') + END, TYPE,
    ),
    "a folded head": (MODEL + FILE + part("x", "y", ';\r\n name="model"') + END, TYPE),
    "a bare line feed in a head": (MODEL + FILE + part("x", "y", "\nA: b") + END, TYPE),
    "a field twice": (part("model", "other") + MODEL + FILE + END, TYPE),
    "a file for one parser, a field for another": (MODEL + FILE + part("model", "b", "; filename*=utf-8''x") + END, TYPE),
    "two files": (MODEL + FILE + FILE + END, TYPE),
    "encoded": (MODEL + FILE + part("language", "ZW4=", "\r\nContent-Transfer-Encoding: base64") + END, TYPE),
}  # fmt: skip


@pytest.mark.parametrize("what", TWO_MEANINGS)
def test_a_form_of_two_meanings_never_reaches_the_engine(gateway: GatewayProcess, engine: VllmDouble, what: str):
    before = len(engine.requests())

    answer = transcribe(gateway, *TWO_MEANINGS[what])

    assert (answer.status, len(engine.requests())) == (400, before), answer.body


@pytest.mark.parametrize(("name", "value"), [
    ("n", "9"), ("n", "0"), ("n", "500"), ("n", "1e3"), ("n", "1_0"), ("n", ""), ("priority", "-5"),
    ("mm_processor_kwargs", "{}"), ("language", "x" * 70_000),
])  # fmt: skip
def test_fields_have_the_bounds_that_they_have_in_json(gateway: GatewayProcess, name: str, value: str):
    answer = transcribe(gateway, MODEL + FILE + part(name, value) + END)

    assert (answer.status, answer.json["error"]["param"]) == (400, name)


@pytest.mark.parametrize("content_type", [
    TYPE, 'Multipart/Form-Data; Boundary="AAA"', "multipart/form-data;boundary=AAA; charset=utf-8",
    "multipart/form-data; charset=utf-8; boundary=AAA",
])  # fmt: skip
def test_the_engine_gets_a_form_that_is_written_here(gateway: GatewayProcess, engine: VllmDouble, content_type: str):
    fields = part("n", "8") + part("timestamp_granularities[]", "word") + part("timestamp_granularities[]", "segment")

    answer = transcribe(gateway, MODEL + fields + FILE + END, content_type)

    assert answer.status == 200, answer.body
    call = engine.requests()[-1]
    sent = {name.lower(): value for name, value in call["headers"].items()}["content-type"]
    boundary = sent.removeprefix("multipart/form-data; boundary=")
    assert len(boundary) == 32
    heads = [entry.partition("\r\n\r\n")[0] for entry in call["body"].split(f"--{boundary}")[1:-1]]
    assert [head.partition("form-data; ")[2].split("\r\n")[0] for head in heads] == [
        'name="model"', 'name="n"', 'name="timestamp_granularities[]"', 'name="timestamp_granularities[]"',
        'name="file"; filename="a.wav"',
    ]  # fmt: skip
    assert "AAA" not in call["body"]
