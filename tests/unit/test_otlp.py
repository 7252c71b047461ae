"""Our spans are, field by field, what the SDK's own encoder would send."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from gateway import otlp

KINDS = {otlp.SERVER: SpanKind.SERVER, otlp.INTERNAL: SpanKind.INTERNAL, otlp.CLIENT: SpanKind.CLIENT}
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
NANOSECONDS = st.integers(0, 2**63)
SPAN = st.fixed_dictionaries(
    {
        "span_id": st.integers(1, 2**64 - 1),
        "parent_id": st.none() | st.integers(1, 2**64 - 1),
        "remote": st.booleans(),
        "name": st.text(max_size=200),
        "kind": st.sampled_from(sorted(KINDS)),
        "start": NANOSECONDS,
        "end": NANOSECONDS,
        "error": st.none() | st.text(max_size=20),
        "attributes": st.dictionaries(
            st.text(min_size=1, max_size=150),
            st.text(max_size=300) | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
            max_size=5,
        ),
    }
)


@given(trace_id=st.integers(1, 2**128 - 1), spans=st.lists(SPAN, max_size=4), name=st.text(max_size=20))
def test_our_bytes_say_what_the_sdk_says(trace_id: int, spans: list[dict[str, Any]], name: str):
    resource = Resource({"service.name": name, "service.version": "1"})
    theirs, ours = [], b""
    for span in spans:
        remote = span["parent_id"] is not None and span["remote"]
        context = SpanContext(trace_id, span["span_id"], is_remote=False, trace_flags=SAMPLED)
        parent = None
        if span["parent_id"] is not None:
            parent = SpanContext(trace_id, span["parent_id"], is_remote=remote, trace_flags=SAMPLED)
        status = Status() if span["error"] is None else Status(StatusCode.ERROR, span["error"])
        theirs.append(
            ReadableSpan(
                name=span["name"],
                context=context,
                parent=parent,
                resource=resource,
                attributes=span["attributes"],
                kind=KINDS[span["kind"]],
                status=status,
                start_time=span["start"],
                end_time=span["end"],
            )
        )
        told = otlp.attributes(9, span["attributes"]) + otlp.status(span["error"])
        ours += otlp.span(
            trace_id, span["span_id"], span["parent_id"], span["name"].encode(), span["kind"], span["start"],
            span["end"], told, remote=remote,
        )  # fmt: skip
    sent = otlp.request(otlp.attributes(1, {"service.name": name, "service.version": "1"}), ours)
    wanted = encode_spans(theirs)
    if not spans:
        del wanted.resource_spans[:]
        sent = b""
    assert ExportTraceServiceRequest.FromString(sent) == wanted


def read(value: Any) -> Any:
    """The value of an attribute as a collector reads it; the span behind it must be readable as well."""
    spans = [otlp.span(1, n, None, b"name", otlp.SERVER, 1, 2, otlp.attributes(9, {"name": value})) for n in (1, 2)]
    request = ExportTraceServiceRequest.FromString(otlp.request(b"", b"".join(spans)))
    first, second = request.resource_spans[0].scope_spans[0].spans
    assert second.attributes == first.attributes
    found = first.attributes[0].value
    return getattr(found, found.WhichOneof("value"))


@given(st.integers() | st.integers(0, 400).map(lambda power: 10**power) | st.integers(0, 400).map(lambda n: -(2**n)))
def test_an_integer_of_any_size_is_told_as_near_as_the_format_can(number: int):
    assert read(number) == max(-(2**63), min(number, 2**63 - 1))


@pytest.mark.parametrize("text", ["\ud800", "a\udce9b", "\x00", "x" * 100_000])
def test_any_string_is_sent(text: str):
    assert read(text) == text.encode(errors="replace").decode()


@pytest.mark.parametrize("number", [math.inf, -math.inf, 5e-324])
def test_floats_at_the_edges_are_sent(number: float):
    assert read(number) == number


def test_not_a_number_is_sent():
    assert math.isnan(read(math.nan))
