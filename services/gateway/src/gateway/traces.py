"""Traces: one a call, W3C context in and out, spans made at the end from the stages' clocks.

Nothing is built for a call that is not kept. Kept are: calls whose parent is sampled, a share of the others, and every
call that failed or was slow (the engine's own spans exist only where the decision was made at the start).
GenAI attribute names: one table (they are still moving, see the semantic conventions' `gen_ai` registry).
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Any

from loguru import logger
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

from gateway import kernel, otlp
from gateway.call import STAGES, Outcome
from gateway.identifiers import fresh

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.call import Call

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_NO_TRACE = "0" * 32
QUEUE = 2048  # kept calls that may wait for the collector

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

    __slots__ = ("_call", "_duration", "_failed", "_model")
    context = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))  # what the SDK asks for

    def __init__(self, call: Call, duration: float, model: str, failed: bool) -> None:
        self._call = _attributes(call, model), call.trace, call.started_at, call.stage_seconds, call.endpoint.name
        self._duration = duration
        self._model = model
        self._failed = (call.error.code if call.error else "") if failed else None

    @property
    def count(self) -> int:
        """How many spans there will be."""
        return 1 + len(self._call[3])

    def spans(self) -> bytes:
        """The call's span and one for each stage."""
        values, trace, started_at, stages, endpoint = self._call
        trace_id, span_id = int(trace.trace_id, 16), int(trace.span_id, 16)
        parent_id = None if trace.parent_id is None else int(trace.parent_id, 16)
        start = at = int(started_at * 1e9)
        name = f"{OPERATIONS.get(endpoint, endpoint)} {self._model}".rstrip().encode(errors="replace")
        told = otlp.attributes(9, values) + otlp.status(self._failed)
        end = start + int(self._duration * 1e9)
        remote = parent_id is not None
        made = [otlp.span(trace_id, span_id, parent_id, name, otlp.SERVER, start, end, told, remote=remote)]
        # The ids of stages lead nowhere but here, save the one that the engine got as its parent's.
        for index, stage in enumerate(STAGES):
            seconds = stages.get(stage)
            if seconds is None:
                continue
            begun, at = at, at + int(seconds * 1e9)
            if stage == "forward":
                own, kind = int(trace.forward_id, 16), otlp.CLIENT
            else:
                own, kind = span_id ^ (index + 1), otlp.INTERNAL
            made.append(otlp.span(trace_id, own, span_id, stage.encode(), kind, begun, at))
        return b"".join(made)


class _Exporter(OTLPSpanExporter):
    """Sends what `_Ended` makes, and counts the spans that the collector did not take or that cannot be made. The
    connection, its headers and second tries are the SDK's."""

    def __init__(self, endpoint: str, resource: Resource) -> None:
        super().__init__(endpoint=f"{endpoint}/v1/traces", timeout=5)
        self._send = self._client.export  # not promised by the SDK, whose version is locked
        self._resource = otlp.attributes(1, {name: str(value) for name, value in resource.attributes.items()})
        self.taken = 0  # calls out of the queue
        self.dropped = 0

    def export(self, spans: Sequence[Any]) -> SpanExportResult:
        """Send a batch of ended calls; called in the processor's thread."""
        kernel.stand_back()
        self.taken += len(spans)
        made, count = [], 0
        for ended in spans:
            try:
                made.append(ended.spans())
                count += ended.count
            except Exception as error:  # whatever it is, it is one call's; the others' spans are sent
                self.dropped += ended.count
                logger.opt(exception=error).error("spans_not_made")
        if self._send(otlp.request(self._resource, b"".join(made))).success:
            return SpanExportResult.SUCCESS
        self.dropped += count
        return SpanExportResult.FAILURE


class Tracer:
    """Sends spans of finished calls in the background; a slow or missing collector costs dropped spans only."""

    def __init__(self, endpoint: str, slow_seconds: float, version: str) -> None:
        self._slow_seconds = slow_seconds
        self._queued = 0  # calls, ever
        self._discarded = 0  # spans of calls that found the queue full; the SDK's own queue would not tell of them
        resource = Resource.create({"service.name": "gateway", "service.version": version})
        self._exporter = _Exporter(endpoint, resource)
        self._processor = BatchSpanProcessor(
            self._exporter, max_queue_size=QUEUE, max_export_batch_size=128, export_timeout_millis=5000
        )

    @property
    def dropped(self) -> int:
        """Spans that did not reach the collector."""
        return self._discarded + self._exporter.dropped

    def end(self, call: Call, duration: float, model: str) -> bool:
        """Queue a finished call, if it is kept; whether it was, so that there is a trace if the collector takes it."""
        failed = call.outcome is Outcome.FAILED or call.outcome is Outcome.INTERRUPTED
        if not (call.trace.sampled or failed or duration >= self._slow_seconds):
            return False
        if self._queued - self._exporter.taken >= QUEUE:
            self._discarded += 1 + len(call.stage_seconds)
            return False
        self._queued += 1
        self._processor.on_end(_Ended(call, duration, model, failed))  # type: ignore[arg-type]  # for _Exporter alone
        return True

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
