"""What is told of a call: metrics, one `call_closed` line, one trace. And the log itself: JSON lines, no secrets.

Nothing here may fail or delay an answer. Prompts and answers are never handed to this file; secrets that a library
might print are masked.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
from loguru import logger

from gateway import traces
from gateway.call import Outcome
from gateway.histograms import MOST_NEW
from gateway.lines import LineWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.call import Call
    from gateway.client import Headers
    from gateway.metrics import Metrics
    from gateway.settings import Settings

_SECRET = re.compile(r"(?i)(bearer\s+|x-api-key['\": ]+|\bsk-)[A-Za-z0-9._~+/=-]{6,}")
_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}


def masked(text: str) -> str:
    """`text` with everything that looks like a secret masked."""
    return _SECRET.sub(lambda found: found[1] + "********", text)


class _Forwarded(logging.Handler):
    """Libraries' own lines: constant event, their text as data."""

    def emit(self, record: logging.LogRecord) -> None:
        text = masked(record.getMessage())
        logger.opt(exception=record.exc_info).bind(logger=record.name, text=text).log(
            record.levelname if record.levelname in _LEVELS else "INFO", "library_log"
        )


def configure_logs(level: str, writer: LineWriter) -> None:
    """Send loguru, and the standard library's loggers through it, to `writer` as JSON lines."""

    def sink(message: Any) -> None:
        record = message.record
        line = {
            "time": record["time"].isoformat(),
            "level": record["level"].name.lower(),
            "event": masked(record["message"]),
            **record["extra"],
        }
        if record["exception"] is not None:
            error = record["exception"]
            line["traceback"] = masked("".join(traceback.format_exception(error.type, error.value, error.traceback)))
        writer.write(line)

    logger.remove()
    logger.add(sink, level=level, backtrace=False, diagnose=False, catch=True)

    logging.basicConfig(handlers=[_Forwarded()], level=logging.WARNING, force=True)


_LINE = (
    '{"time":"%s.%06d+00:00","level":"%s","event":"call_closed","request_id":"%s","trace_id":"%s","key_id":%s,%s,'
    '"outcome":"%s","status":%d,"code":%s,"detail":%s,"stream":%s,"prompt_tokens":%d,"completion_tokens":%d,'
    '"cached_tokens":%d,"duration_seconds":%.6f,"first_token_seconds":%s,"stages":{%s},"backend":%s}\n'
)
_stages: dict[tuple[str, ...], str] = {}  # how the stages of a call are written, by which there were


def _quoted(text: str | None) -> str:
    """A JSON string, or null."""
    return "null" if text is None else msgspec.json.encode(text).decode()


class _Children:
    """Metric children of one (endpoint, model), looked up once."""

    __slots__ = ("completion", "duration", "first_token", "inter_token", "names", "outcomes", "prompt")

    def __init__(self, metrics: Metrics, endpoint: str, model: str) -> None:
        self.names = f'"endpoint":"{endpoint}","model":{_quoted(model)}'
        self.outcomes = {outcome: metrics.requests.labels(endpoint, model, outcome) for outcome in Outcome}
        self.duration = metrics.duration.labels(endpoint, model)
        self.first_token = metrics.first_token.labels(endpoint, model)
        self.inter_token = metrics.inter_token.labels(endpoint, model)
        self.prompt = metrics.tokens.labels(model, "prompt")
        self.completion = metrics.tokens.labels(model, "completion")


class Telemetry:
    """Tells of calls. `known_model` says which model names may become labels; every other one is `other`."""

    def __init__(
        self, settings: Settings, metrics: Metrics, writer: LineWriter, known_model: Callable[[str], bool], version: str
    ) -> None:
        self._ratio = settings.trace_ratio
        self._level = _LEVELS[settings.log_level]
        self._metrics = metrics
        self._writer = writer
        self._known_model = known_model
        self._children: dict[tuple[str, str], _Children] = {}
        self._stages: list[dict[str, float]] = []  # of ended calls, not in their histograms yet
        self._lag = 0.0
        self.on_end: Callable[[Call], None] | None = None  # who else wants to know of ended calls
        endpoint = settings.otel_exporter_otlp_endpoint
        self._tracer = traces.Tracer(endpoint, settings.trace_slow_seconds, version) if endpoint else None

    def begin(self, call: Call, headers: Headers) -> None:
        """Place the call in its trace."""
        call.loop_lag = self._lag
        call.trace = traces.begin(headers.get(b"traceparent"), call.request_id, self._ratio)

    def model_label(self, call: Call) -> str:
        """The model as a label: a configured name, or `other`; empty while it is not known."""
        if call.request is None:
            return ""
        return call.request.model if self._known_model(call.request.model) else "other"

    def end(self, call: Call) -> None:
        """Trace, count and log a finished call. Only a call whose trace is sent becomes an exemplar."""
        duration = time.perf_counter() - call.started
        model = self.model_label(call)
        key = (call.endpoint.name, model)
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = _Children(self._metrics, *key)
        kept = self._tracer is not None and self._tracer.end(call, duration, model)
        self._count(call, children, duration, call.trace.trace_id if kept else None)
        if self._level <= 20 or call.outcome is Outcome.FAILED:
            self._writer.write_line(_line(call, children.names, duration))
        if self.on_end is not None:
            self.on_end(call)

    def _count(self, call: Call, children: _Children, duration: float, exemplar: str | None) -> None:
        outcome = call.outcome or Outcome.FAILED
        children.outcomes[outcome].value += 1
        children.duration.observe(duration, exemplar)
        usage = call.usage
        if call.first_token_at is not None and call.request is not None and call.request.stream:
            first = call.first_token_at - call.started
            children.first_token.observe(first, exemplar)
            if usage.completion > 1:
                children.inter_token.observe((duration - first) / (usage.completion - 1))
        if usage.known:
            children.prompt.value += usage.prompt
            children.completion.value += usage.completion
        self._stages.append(call.stage_seconds)
        if len(self._stages) >= MOST_NEW:
            self._settle_stages()
        if outcome is Outcome.REFUSED and call.error is not None:
            self._metrics.refusals.labels(call.error.code).inc()

    def _settle_stages(self) -> None:
        """Bring the stages of ended calls into their histograms, many at a time."""
        metrics = self._metrics
        for stage, child in (*metrics.stage_children.items(), ("capacity", metrics.queue_seconds)):
            child.new += [seconds[stage] for seconds in self._stages if stage in seconds]
            child.settle()
        self._stages.clear()

    def fault(self, call: Call, error: BaseException) -> None:
        """Log a fault of ours, once, with its traceback."""
        logger.opt(exception=error).bind(request_id=call.request_id, stage=call.stage).error("call_fault")

    def fault_in_route(self, request_id: str, error: BaseException) -> None:
        """Log a fault of ours outside the relayed routes."""
        logger.opt(exception=error).bind(request_id=request_id).error("route_fault")

    def refresh(self) -> None:
        """Bring up to date what is not counted call by call; called before each exposition."""
        self._settle_stages()
        _advance(self._metrics.log_dropped, self._writer.dropped)
        if self._tracer is not None:
            _advance(self._metrics.spans_dropped, self._tracer.dropped)

    async def watch_loop(self, period: float = 0.25) -> None:
        """Measure for ever how late the event loop's timers run."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + period
            await asyncio.sleep(period)
            self._lag = max(0.0, loop.time() - due)
            self._metrics.loop_lag.set(self._lag)

    def close(self) -> None:
        """Send what is left."""
        if self._tracer is not None:
            self._tracer.close()


def _line(call: Call, names: str, duration: float) -> bytes:
    """`call_closed`. What is not quoted here has no characters to quote: ids, codes, outcomes and numbers."""
    global _second
    ended = call.started_at + duration
    whole = int(ended)
    if _second[0] != whole:  # a busy second has thousands of lines
        _second = (whole, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)))
    seconds = call.stage_seconds
    kinds = tuple(seconds)
    stages = _stages.get(kinds)
    if stages is None:
        stages = _stages[kinds] = ",".join([f'"{stage}":%.6f' for stage in kinds])
    usage, error, request, caller = call.usage, call.error, call.request, call.caller
    return (
        _LINE
        % (
            _second[1],
            (ended - whole) * 1e6,
            "error" if call.outcome is Outcome.FAILED else "info",
            call.request_id,
            call.trace.trace_id,
            "null" if caller is None else _quoted(caller.key_id),
            names,
            call.outcome,
            call.status,
            "null" if error is None else f'"{error.code}"',
            "null" if error is None else _quoted(_detail(call)),
            "true" if request is not None and request.stream else "false",
            usage.prompt,
            usage.completion,
            usage.cached,
            duration,
            "null" if call.first_token_at is None else f"{call.first_token_at - call.started:.6f}",
            stages % tuple(seconds.values()),
            "null" if call.backend is None else _quoted(call.backend.name),
        )
    ).encode()


_second: tuple[int, str] = (0, "")


def _detail(call: Call) -> str | None:
    """Why a call failed, for an operator: our own words and the kind of the library's error, never its text."""
    if call.outcome is not Outcome.FAILED or call.error is None:
        return None
    cause = call.error.__cause__
    return f"{call.error.message} ({type(cause).__name__})" if cause is not None else call.error.message


def _advance(counter: Any, total: float) -> None:
    counter.inc(max(0.0, total - counter._value.get()))  # prometheus_client offers no absolute value for counters
