"""The composition root: everything is made here once, started in order, drained and stopped in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import shutil
import signal
import sys
import threading
from typing import TYPE_CHECKING

import msgspec
import uvloop
from loguru import logger

from gateway import __version__, admin, kernel, server
from gateway.addresses import Addresses
from gateway.api import Api
from gateway.backends import Backend, Probe, Registry
from gateway.call import Outcome
from gateway.energy import Meter
from gateway.errors import UpstreamError
from gateway.keyring import Keyring
from gateway.lines import LineWriter
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.prompt_count import PromptCounter
from gateway.reconciliation import Reconciliation
from gateway.stages import dispatch
from gateway.stages.auth import Auth
from gateway.stages.budget import Budget
from gateway.stages.capacity import Capacity
from gateway.stages.forward import Forward
from gateway.stages.ledger import Ledger
from gateway.store import Store, StoreLocked, StoreNewer, StoreUnavailable
from gateway.telemetry import Telemetry, configure_logs
from gateway.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from quart import Blueprint

    from gateway.call import Call
    from gateway.settings import Settings

PROBE_SECONDS = 5.0
RECONCILE_SECONDS = 5.0
_OWN_TOKENS = re.compile(rb"^engine_own_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)
# Calls leave no cycles behind (docs/profile.md): the collector has nothing to find, and every 700 objects, its default,
# come together in a dozen calls under way. Large enough to be rare, small enough that one look takes no millisecond.
GC_THRESHOLDS = (10_000, 20, 50)
TELEMETRY_SECONDS = 3.0  # what the trace collector gets at the end
_TOKEN_COUNTERS = re.compile(rb"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Gateway:
    """All parts of one gateway. Made on the running loop."""

    def __init__(self, settings: Settings, writer: LineWriter) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.upstream = Upstream(settings.connect_seconds)
        self.registry = Registry.of(settings, self._probe)
        self.prompt_counter = PromptCounter(self.upstream, self.registry)
        self.keyring = Keyring(settings)
        self.store = Store(settings, self.keyring.apply)
        self.auth = Auth(self.keyring)
        self.budget = Budget(settings, self.store, self.registry, self.keyring)
        self.capacity = Capacity(settings, self.registry, dispatch.choose)
        self.ledger = Ledger(
            self.store, self.registry, self.budget.live, self.budget.days, hold_seconds=settings.hold_seconds
        )
        self.forward = Forward(
            settings, self.upstream, self.registry, self.capacity, self._finish, self.metrics.retries.inc
        )
        self.telemetry = Telemetry(settings, self.metrics, writer, self.registry.serves, __version__)
        self.pipeline = Pipeline(
            settings,
            registry=self.registry,
            prompt_counter=self.prompt_counter,
            auth=self.auth,
            budget=self.budget,
            capacity=self.capacity,
            forward=self.forward,
            ledger=self.ledger,
            telemetry=self.telemetry,
        )
        self.meter = self._meter()
        self.addresses = Addresses(settings.proxy_networks)
        self.reconciliation = Reconciliation(
            self._engine_tokens,
            lambda: self.ledger.computed_tokens,
            self.budget.live.values,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics.build.labels(__version__).set(1)
        self.metrics.in_flight.set_function(lambda: len(self.pipeline.calls))

    async def _finish(self, call: Call) -> None:
        """Everything about a whole answer that must be done before its last bytes leave."""
        call.enter("ledger")
        self.capacity.leave(call)  # the engine is done with it, and need not wait for the database
        await self.ledger.settle(call)
        self.budget.release(call)

    def blueprints(self) -> list[Blueprint]:
        """The routes for keys, usage and the queue."""
        return [admin.blueprint(self.settings, self.store, self.auth, self.budget, self.addresses, self.capacity.queue)]

    async def _probe(self, backend: Backend) -> Probe:
        """Ask an engine how it is and what it serves. Raises `UpstreamError` when it does not answer."""
        headers = {"authorization": f"Bearer {backend.api_key}"} if backend.api_key else {}
        status, _ = await self.upstream.get(f"{backend.url}/health", headers, PROBE_SECONDS)
        if status != 200:
            return Probe(False, (), None)
        status, body = await self.upstream.get(f"{backend.url}/v1/models", headers, PROBE_SECONDS)
        if status != 200:
            raise UpstreamError(f"/v1/models of {backend.name} answers {status}")
        try:
            listed = msgspec.json.decode(body)["data"]
            names = tuple(str(model["id"]) for model in listed)
            lengths = [model.get("max_model_len") for model in listed if model.get("max_model_len")]
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
            raise UpstreamError(f"/v1/models of {backend.name} cannot be read") from None
        template = backend.template_tokens if names == backend.served else None
        if template is None and names:
            template = await self.prompt_counter.template(backend, names[0])
        return Probe(True, names, min(lengths) if lengths else None, template)

    def _meter(self) -> Meter | None:
        url = self.settings.gpu_exporter_url
        if url is None:
            return None

        async def read() -> bytes:
            status, body = await self.upstream.get(f"{url}/energy", {}, PROBE_SECONDS)
            if status != 200:
                raise UpstreamError(f"the GPU exporter answers {status}")
            return body

        def record(shares: dict[str, float]) -> None:
            today = self.budget.days.today()
            self.store.add_energy([(today, key_id, joules) for key_id, joules in shares.items()])

        meter = Meter(
            read, lambda: self.pipeline.calls.values(), record, lambda use, j: self.metrics.energy.labels(use).inc(j)
        )
        self.telemetry.on_end = meter.note
        return meter

    async def start(self) -> None:
        """Open the store, begin to watch engines. Raises what `Store.start` raises."""
        started = await self.store.start(lambda: frozenset(self.budget.live))
        await self.budget.start()
        self.metrics.requests.labels("other", "other", Outcome.LOST).inc(started.lost)
        self.registry.start()
        self.ledger.start(self.budget.tick)
        self.forward.start()
        self._spawn(self.telemetry.watch_loop())
        self._spawn(self._reconcile())
        if self.meter is not None:
            self._spawn(self.meter.run())

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _engine_tokens(self) -> dict[str, tuple[int, int]]:
        """What `Reconciliation` reads: tokens that each engine has counted, and its supervisor's share of them."""
        counted = {}
        for backend in self.registry.backends:
            with contextlib.suppress(UpstreamError):
                status, body = await self.upstream.get(f"{backend.url}/metrics", {}, PROBE_SECONDS)
                found = _TOKEN_COUNTERS.findall(body) if status == 200 else []
                if found:
                    own = sum(float(value) for value in _OWN_TOKENS.findall(body))
                    counted[backend.name] = round(sum(float(value) for value in found)), round(own)
        return counted

    async def _reconcile(self) -> None:
        while True:
            await self.reconciliation.sample()
            await asyncio.sleep(RECONCILE_SECONDS)

    def causes(self) -> list[str]:
        """Why a call would not be admitted now; empty when it would."""
        causes = []
        if self.pipeline.draining:
            causes.append("shutting_down")
        if not self.ledger.healthy:
            causes.append("ledger_unavailable")
        ready, cause = self.registry.ready()
        if not ready:
            causes.append(cause)
        return causes

    def refresh_metrics(self) -> None:
        """Bring gauges up to date that are read, not counted."""
        metrics = self.metrics
        for backend in self.registry.backends:
            metrics.backend_up.labels(backend.name).set(backend.healthy)
        for name, state in self.registry.breaker_states().items():
            metrics.breaker.labels(name).set(state)
        for priority, calls in self.capacity.waiting().items():
            metrics.queue_calls.labels(priority).set(calls)
        metrics.ledger_up.set(self.store.healthy)
        metrics.ledger_failures.value = self.store.failures
        metrics.spool.set(self.store.aside)
        metrics.holds.set(len(self.budget.live))
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(self.store.folder)
            metrics.disk_free.set(usage.free)
            metrics.disk_size.set(usage.total)
        metrics.drift.set(self.reconciliation.drift)
        self.telemetry.refresh()

    async def stop(self) -> None:
        """End everything in reverse. Calls have ended before."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.forward.close()
        self.capacity.close()
        await self.registry.close()
        await self.ledger.stop()
        await self.store.close()
        await self.upstream.close()
        # A mute collector must not hold up the end: what it did not take within this time is dropped.
        closing = threading.Thread(target=self.telemetry.close, name="telemetry-close", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, TELEMETRY_SECONDS)


async def _run(settings: Settings, writer: LineWriter) -> None:
    gateway = Gateway(settings, writer)
    await gateway.start()
    stop = asyncio.Event()
    drained = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async def drain() -> None:
        await stop.wait()
        logger.bind(calls=len(gateway.pipeline.calls), seconds=settings.drain_seconds).info("drain_started")
        await gateway.pipeline.drain(settings.drain_seconds, lambda left: logger.bind(calls=left).info("drain_waiting"))
        logger.info("drain_ended")
        drained.set()

    def listening(addresses: list[tuple[str, int]]) -> None:
        host, port = addresses[0]
        # What exists now lives as long as the process: the collector need not look at it for every generation.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        kernel.use_large_pages()
        logger.bind(host=host, port=port, version=__version__).info("listening")

    drainer = asyncio.create_task(drain())
    try:
        await server.serve(Api(gateway), settings, drained, listening)
    finally:
        drainer.cancel()
        await asyncio.gather(drainer, return_exceptions=True)
        await gateway.stop()


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT, drain, stop. Returns the exit status: 0, 1 for a failure, 2 for configuration."""
    writer = LineWriter()
    configure_logs(settings.log_level, writer)
    try:
        uvloop.run(_run(settings, writer))
    except (StoreLocked, StoreNewer, StoreUnavailable) as error:
        print(f"gateway: DATABASE_URL: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{settings.gateway_host}:{settings.gateway_port}"
        print(f"gateway: GATEWAY_HOST, GATEWAY_PORT: cannot listen on {where}: {error}", file=sys.stderr)
        return 2
    finally:
        writer.close()
    return 0
