"""Every metric family of the supervisor, declared once."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from engine.states import Phase, Reason, State


class Metrics:
    """The families, with every label value present from the start."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.state = Gauge("engine_state", "1 for the state the engine is in.", ["state"], registry=registry)
        self.restarts = Counter(
            "engine_restarts_total", "Runs of vLLM that were replaced, by cause.", ["reason"], registry=registry
        )
        self.ready_seconds = Gauge(
            "engine_ready_seconds",
            "Seconds the last start took, by phase; `total` for all of it.",
            ["phase"],
            registry=registry,
        )
        self.canary_seconds = Histogram(
            "engine_canary_seconds",
            "Seconds the one-token canary took to come back.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=registry,
        )
        self.canaries_lost = Counter(
            "engine_canaries_lost_total", "Canaries that were refused, broken or too late.", registry=registry
        )
        self.suspicion = Gauge(
            "engine_suspicion_seconds", "For how long nothing has moved since the watchdog looked.", registry=registry
        )
        self.bound = Gauge("engine_hang_bound_seconds", "Suspicion that counts as a hang now.", registry=registry)
        self.calls = Gauge("engine_calls", "Calls inside vLLM, canaries not counted.", registry=registry)
        self.prefill_rate = Gauge(
            "engine_prefill_tokens_per_second", "Prefill speed that the warm-up measured.", registry=registry
        )
        for reason in Reason:
            self.restarts.labels(reason.value)
        self.show(State.STARTING)

    def show(self, current: State) -> None:
        """1 for `current`, 0 for the others."""
        for state in State:
            self.state.labels(state.value).set(1 if state is current else 0)

    def started(self, seconds: dict[Phase, float]) -> None:
        """Note how long a start took."""
        for phase in Phase:
            self.ready_seconds.labels(phase.value).set(seconds.get(phase, 0.0))
        self.ready_seconds.labels("total").set(sum(seconds.values()))
