"""Every metric family, declared once. Labels come from configured sets only; children are cached by the callers.

`docs/metrics.md` is generated from this file's registry.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector
from prometheus_client import Counter as RareCounter
from prometheus_client import exposition as text
from prometheus_client.openmetrics import exposition as openmetrics

from gateway.call import STAGES
from gateway.histograms import Counter, Histogram

# SLO thresholds are bucket bounds: 2.5 s to the first token, 30 s for a call, 0.1 s between tokens.
_DURATION = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_INTER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_STAGE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120)


class Metrics:
    """All families of one gateway, in a registry of its own. Units are in the names."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        per_call = ("endpoint", "model", "outcome")
        self.requests = Counter("gateway_requests", "Calls ended.", per_call, registry)
        self.duration = Histogram(
            "gateway_request_duration_seconds", "Time from the head of a request to the end of its answer.",
            ("endpoint", "model"), registry, _DURATION,
        )  # fmt: skip
        self.first_token = Histogram(
            "gateway_time_to_first_token_seconds", "Time from the head of a request to its first generated token.",
            ("endpoint", "model"), registry, _FIRST_TOKEN,
        )  # fmt: skip
        self.inter_token = Histogram(
            "gateway_inter_token_seconds", "Mean time between tokens of a stream, once per stream.",
            ("endpoint", "model"), registry, _INTER_TOKEN,
        )  # fmt: skip
        self.stage = Histogram("gateway_stage_seconds", "Time a call spent in a stage.", ("stage",), registry, _STAGE)
        self.stage_children = {stage: self.stage.labels(stage) for stage in STAGES}
        self.in_flight = Gauge("gateway_in_flight_calls", "Calls between their head and their end.", registry=registry)
        self.queue_calls = Gauge(
            "gateway_queue_calls", "Calls that wait for the engine.", ("priority",), registry=registry
        )
        self.queue_seconds = Histogram(
            "gateway_queue_seconds", "Time calls waited for the engine.", (), registry, _STAGE
        ).labels()
        self.refusals = RareCounter("gateway_refusals", "Calls refused, by error code.", ("code",), registry=registry)
        self.tokens = Counter("gateway_tokens", "Tokens settled.", ("model", "direction"), registry)
        self.retries = RareCounter("gateway_retries", "Exchanges tried again before the first byte.", registry=registry)
        self.backend_up = Gauge("gateway_backend_up", "1 if the engine is healthy.", ("backend",), registry=registry)
        self.breaker = Gauge("gateway_breaker_state", "0 closed, 1 half-open, 2 open.", ("backend",), registry=registry)
        self.drift = Gauge(
            "gateway_ledger_drift_tokens", "Tokens the engines counted less tokens in the ledger and in flight.",
            registry=registry,
        )  # fmt: skip
        self.ledger_up = Gauge(
            "gateway_ledger_up", "1 while usage can be recorded; while it is 0 no call is admitted.", registry=registry
        )
        self.ledger_failures = Counter(
            "gateway_ledger_failures", "Times the database refused or did not answer.", (), registry
        ).labels()
        self.spool = Gauge(
            "gateway_ledger_spool_records", "Usage records that wait for the database.", registry=registry
        )
        self.holds = Gauge("gateway_holds", "Holds of running calls.", registry=registry)
        self.energy = RareCounter(
            "gateway_energy_joules",
            "Energy of the GPUs: of `calls`, `idle` when none ran, `unknown` while it was not read for over a minute.",
            ("use",), registry=registry,
        )  # fmt: skip
        self.loop_lag = Gauge(
            "gateway_event_loop_lag_seconds", "How late the event loop's timers run.", registry=registry
        )
        self.log_dropped = RareCounter(
            "gateway_log_lines_dropped", "Log lines dropped: the reader is slow.", registry=registry
        )
        self.spans_dropped = RareCounter(
            "gateway_spans_dropped", "Spans that did not reach the collector.", registry=registry
        )
        self.disk_free = Gauge("gateway_disk_free_bytes", "Free bytes where the ledger lives.", registry=registry)
        self.disk_size = Gauge("gateway_disk_size_bytes", "Size of the disk where the ledger lives.", registry=registry)
        self.build = Gauge("gateway_build_info", "1, with the version.", ("version",), registry=registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics (with exemplars) where it is asked for, else text."""
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self.registry), openmetrics.CONTENT_TYPE_LATEST
        return text.generate_latest(self.registry), text.CONTENT_TYPE_LATEST
