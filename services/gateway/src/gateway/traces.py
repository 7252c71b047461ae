"""Traces: one a call, W3C context in and out, spans made at the end from the stages' clocks.

Nothing is built for a call that is not kept. Kept are: calls whose parent is sampled, a share of the others, and every
call that failed or was slow (the engine's own spans exist only where the decision was made at the start).
GenAI attribute names: one table (they are still moving, see the semantic conventions' `gen_ai` registry).
"""

from __future__ import annotations

import random
import re
from itertools import chain
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from gateway.call import STAGES, Outcome
from gateway.identifiers import fresh

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway.call import Call

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_NO_TRACE = "0" * 32
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status()

OPERATIONS = {
    "chat_completions": "chat",
    "messages": "chat",
    "responses": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}

GENAI = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "model": "gen_ai.request.model",
    "max_tokens": "gen_ai.request.max_tokens",
    "stream": "gen_ai.request.stream",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "first_token": "gen_ai.response.time_to_first_chunk",
    "error": "error.type",
}


class Trace:
    """A call's place in its trace. `traceparent` is what the engine gets."""

    __slots__ = ("forward_id", "parent_id", "sampled", "span_id", "trace_id")

    def __init__(self, trace_id: str, parent_id: str | None, sampled: bool) -> None:
        ids = fresh()
        self.trace_id = trace_id
        self.parent_id = parent_id
        self.sampled = sampled
        self.span_id = ids[:16]
        self.forward_id = ids[16:]

    @property
    def traceparent(self) -> str:
        """The W3C header for the next hop."""
        return f"00-{self.trace_id}-{self.forward_id}-{'01' if self.sampled else '00'}"


def begin(traceparent: bytes | None, request_id: str, ratio: float) -> Trace:
    """Continue the caller's trace, or start one: its id is the request id where that has the form (nginx's has)."""
    sampled = random.random() < ratio  # noqa: S311  # sampling is no secret
    if traceparent is not None:
        found = _TRACEPARENT.fullmatch(traceparent.decode("latin-1"))
        if found is not None and found[1] != "0" * 32 and found[2] != "0" * 16:
            return Trace(found[1], found[2], bool(int(found[3], 16) & 1) or sampled)
    usable = _TRACE_ID.fullmatch(request_id) is not None and request_id != _NO_TRACE
    return Trace(request_id if usable else fresh(), None, sampled)


class _Ended:
    """A finished call on its way to the exporter's thread, which makes the spans of it."""

    __slots__ = ("attributes", "context", "duration", "forward_id", "name", "parent", "stages", "start", "status")

    def __init__(self, call: Call, duration: float, model: str, failed: bool) -> None:
        trace: Trace = call.trace
        trace_id = int(trace.trace_id, 16)
        self.context = SpanContext(trace_id, int(trace.span_id, 16), is_remote=False, trace_flags=_SAMPLED)
        self.parent: SpanContext | None = None
        if trace.parent_id is not None:
            self.parent = SpanContext(trace_id, int(trace.parent_id, 16), is_remote=True, trace_flags=_SAMPLED)
        self.forward_id = trace.forward_id
        self.start = int(call.started_at * 1e9)
        self.duration = int(duration * 1e9)
        self.status = Status(StatusCode.ERROR, call.error.code if call.error else None) if failed else _UNSET
        self.name = f"{OPERATIONS.get(call.endpoint.name, call.endpoint.name)} {model}".rstrip()
        self.attributes = _attributes(call, model)
        self.stages = call.stage_seconds

    def spans(self, resource: Resource) -> Iterator[ReadableSpan]:
        """The call's span and one for each stage."""
        yield ReadableSpan(
            name=self.name, context=self.context, parent=self.parent, resource=resource, attributes=self.attributes,
            kind=SpanKind.SERVER, status=self.status, start_time=self.start, end_time=self.start + self.duration,
        )  # fmt: skip
        at = self.start
        # The ids of stages lead nowhere but here, save the one that the engine got as its parent's.
        number = self.context.span_id
        for index, stage in enumerate(STAGES):
            seconds = self.stages.get(stage)
            if seconds is None:
                continue
            span_id = int(self.forward_id, 16) if stage == "forward" else number ^ (index + 1)
            context = SpanContext(self.context.trace_id, span_id, is_remote=False, trace_flags=_SAMPLED)
            end = at + int(seconds * 1e9)
            yield ReadableSpan(
                name=stage, context=context, parent=self.context, resource=resource, attributes={},
                kind=SpanKind.CLIENT if stage == "forward" else SpanKind.INTERNAL, status=_UNSET, start_time=at,
                end_time=end,
            )  # fmt: skip
            at = end


class _Service(Resource):
    """A resource that is hashed once: the SDK's hash is a JSON text, made again for every span."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class _Exporter(SpanExporter):
    """Makes the spans, sends them, and counts the calls that the collector did not take."""

    def __init__(self, inner: SpanExporter, resource: Resource) -> None:
        self._inner = inner
        self._resource = resource
        self.dropped = 0

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        made = list(chain.from_iterable(ended.spans(self._resource) for ended in spans))
        result = self._inner.export(made)
        if result is not SpanExportResult.SUCCESS:
            self.dropped += len(made)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


class Tracer:
    """Sends spans of finished calls in the background; a slow or missing collector costs dropped spans only."""

    def __init__(self, endpoint: str, slow_seconds: float, version: str) -> None:
        self._slow_seconds = slow_seconds
        resource = Resource.create({"service.name": "gateway", "service.version": version})
        self._exporter = _Exporter(OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=5), _Service(resource))
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=2048, max_export_batch_size=128, export_timeout_millis=5000
        )

    @property
    def dropped(self) -> int:
        """Spans that the collector did not take."""
        return self._exporter.dropped

    def end(self, call: Call, duration: float, model: str) -> None:
        """Make and queue the spans of a finished call, if it is kept."""
        failed = call.outcome is Outcome.FAILED or call.outcome is Outcome.INTERRUPTED
        if call.trace.sampled or failed or duration >= self._slow_seconds:
            self._processor.on_end(_Ended(call, duration, model, failed))  # type: ignore[arg-type]  # for _Exporter alone

    def close(self) -> None:
        """Send what is left; bounded by the exporter's timeout."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]


def _attributes(call: Call, model: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "operation": OPERATIONS.get(call.endpoint.name, call.endpoint.name),
        "provider": "vllm",
        "model": model or None,
        "input_tokens": call.usage.prompt,
        "output_tokens": call.usage.completion,
        "cached_tokens": call.usage.cached,
        "error": call.error.code if call.error else None,
    }
    if call.request is not None:
        values["stream"] = call.request.stream
        values["max_tokens"] = call.request.output_limit or call.request.max_output
    if call.first_token_at is not None:
        values["first_token"] = call.first_token_at - call.started
    attributes = {GENAI[name]: value for name, value in values.items() if value is not None}
    attributes["appliance.request_id"] = call.request_id
    attributes["appliance.outcome"] = str(call.outcome)
    attributes["http.response.status_code"] = call.status
    if call.caller is not None:
        attributes["appliance.key_id"] = call.caller.key_id
    if call.backend is not None:
        attributes["appliance.backend"] = call.backend.name
    return attributes
