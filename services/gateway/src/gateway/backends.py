"""The engines: which there are, which models they serve, how they are, and how much they have to do.

Health is polled (through a callable that does the I/O) and corrected by the results of calls. An engine whose health
is unknown gets no calls. What an engine serves is remembered while it is down, so that callers are told "not now" (503)
and not "no such model" (404).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gateway.breaker import Breaker, BreakerState
from gateway.errors import ModelNotFound, NoBackend

if TYPE_CHECKING:
    from gateway.settings import BackendConfig, Settings

UNHEALTHY_AFTER = 2  # failed polls in a row: one slow answer of a busy engine is no outage
TEMPLATE_TOKENS = 8  # role marks, where an engine cannot say what its template adds
URGENT_SECONDS = 0.25  # after a failed call the next poll comes this soon


@dataclass(frozen=True, slots=True)
class Probe:
    """What a poll found. `models` are the ids of `/v1/models`, `max_model_len` in tokens; `template_tokens` are what
    the chat template adds (None: not known yet)."""

    ok: bool
    models: tuple[str, ...] = ()
    max_model_len: int | None = None
    template_tokens: int | None = None


class Backend:
    """One engine. `in_flight` are calls that hold a place, `outstanding` the tokens they are expected to cost."""

    __slots__ = (
        "api_key", "breaker", "configured", "failed_polls", "healthy", "in_flight", "limit", "max_model_len", "name",
        "outstanding", "served", "served_name", "template_tokens", "url", "weight",
    )  # fmt: skip

    def __init__(self, config: BackendConfig, limit: int, breaker: Breaker) -> None:
        self.name = config.name
        self.url = config.url.rstrip("/")
        self.api_key = config.api_key
        self.weight = config.weight
        self.configured = tuple(config.models) if config.models else None
        self.served_name = config.served_name
        self.limit = limit
        self.breaker = breaker
        self.healthy = False
        self.failed_polls = 0
        self.served: tuple[str, ...] = ()  # what the engine says
        self.max_model_len: int | None = None
        self.template_tokens: int | None = None
        self.in_flight = 0
        self.outstanding = 0.0

    @property
    def models(self) -> tuple[str, ...]:
        """The names callers may use."""
        return self.configured if self.configured is not None else self.served

    def available(self, now: float) -> bool:
        """Whether calls may be sent to it at all."""
        return self.healthy and self.breaker.allows(now)

    def free(self, now: float) -> bool:
        """Whether it has a place for one more call now."""
        return self.in_flight < self.limit and self.healthy and self.breaker.allows(now)

    def __repr__(self) -> str:
        return f"<Backend {self.name} healthy={self.healthy} in_flight={self.in_flight}/{self.limit} {self.breaker!r}>"


@dataclass(slots=True)
class Registry:
    """All engines. `probe` asks one for its health; `on_change` is called when calls may go where they could not."""

    backends: tuple[Backend, ...]
    probe: Callable[[Backend], Awaitable[Probe]]
    poll_seconds: float = 2.0
    clock: Callable[[], float] = time.monotonic
    on_change: Callable[[], None] = lambda: None
    _pools: dict[str, tuple[Backend, ...]] = field(default_factory=dict)
    _polls: list[asyncio.Task[None]] = field(default_factory=list)
    _urgent: dict[str, asyncio.Event] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Settings, probe: Callable[[Backend], Awaitable[Probe]]) -> Registry:
        """The engines of the configuration."""
        backends = tuple(
            Backend(config, settings.engine_concurrency, Breaker(settings.breaker_failures, settings.breaker_seconds))
            for config in settings.backend_configs
        )
        return cls(backends, probe, settings.health_seconds)

    # Which engine serves what

    def pool(self, model: str) -> tuple[Backend, ...]:
        """The engines that serve `model`. Raises `ModelNotFound`, or `NoBackend` while nobody can know."""
        pool = self._pools.get(model)
        if pool is None:
            pool = tuple(backend for backend in self.backends if model in backend.models)
            if not pool:
                if any(backend.configured is None and not backend.served for backend in self.backends):
                    raise NoBackend("The engine has not started yet.")
                raise ModelNotFound("No engine serves this model; GET /v1/models lists what there is.", param="model")
            self._pools[model] = pool
        return pool

    def serves(self, model: str) -> bool:
        """Whether an engine serves `model`, up or down."""
        return model in self._pools or any(model in backend.models for backend in self.backends)

    def served_name(self, backend: Backend, model: str) -> str:
        """What `backend` calls the model that callers call `model`."""
        if backend.served_name is not None:
            return backend.served_name
        if model in backend.served or not backend.served:
            return model
        return backend.served[0]

    def max_model_len(self, model: str) -> int | None:
        """The longest context of `model`, tokens; the smallest of its engines; None while unknown."""
        shortest: int | None = None
        for backend in self.backends:
            length = backend.max_model_len
            if length is not None and (shortest is None or length < shortest) and model in backend.models:
                shortest = length
        return shortest

    def template_tokens(self, model: str) -> int:
        """What the chat template of `model` adds to a prompt, tokens; the largest of its engines."""
        found = 0
        for backend in self.pool(model):
            tokens = TEMPLATE_TOKENS if backend.template_tokens is None else backend.template_tokens
            if tokens > found:
                found = tokens
        return found

    def models(self) -> list[dict[str, Any]]:
        """The entries of `GET /v1/models`: every name that an engine serves, once."""
        entries: dict[str, dict[str, Any]] = {}
        for backend in self.backends:
            for name in backend.models:
                entry = entries.setdefault(
                    name,
                    {"id": name, "object": "model", "created": 0, "owned_by": "appliance", "max_model_len": None},
                )
                if entry["max_model_len"] is None:
                    entry["max_model_len"] = self.max_model_len(name)
        return list(entries.values())

    def ready(self) -> tuple[bool, str]:
        """Whether a call would be admitted to an engine, and if not, why."""
        now = self.clock()
        if any(backend.available(now) for backend in self.backends):
            return True, ""
        if any(backend.healthy for backend in self.backends):
            return False, "engine failing"
        return False, "no healthy engine"

    def seconds_to_recovery(self, pool: tuple[Backend, ...]) -> float:
        """How soon an engine of `pool` can be usable again at the earliest."""
        now = self.clock()
        waits = [max(b.breaker.seconds_left(now), 0.0 if b.healthy else self.poll_seconds) for b in pool]
        return min(waits, default=self.poll_seconds)

    # How they are

    def report(self, backend: Backend, ok: bool) -> None:
        """The result of one call. Results of callers' own mistakes are not reported at all."""
        now = self.clock()
        if ok:
            if backend.breaker.succeed():
                self.on_change()
            return
        if backend.breaker.fail(now):
            self._wake_when_allowed(backend, now)
        if (urgent := self._urgent.get(backend.name)) is not None:
            urgent.set()

    def flow(self, backend: Backend) -> None:
        """Answers that it gave before go on: failures so far were not in a row."""
        backend.breaker.flow()

    def _wake_when_allowed(self, backend: Backend, now: float) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # without a loop nobody waits
        loop.call_later(backend.breaker.seconds_left(now) + 0.001, self.on_change)

    def note(self, backend: Backend, probe: Probe) -> None:
        """Take over what a poll found."""
        if probe.ok:
            backend.failed_polls = 0
            changed = not backend.healthy
            backend.healthy = True
            if changed:
                backend.breaker.recover()
            backend.template_tokens = probe.template_tokens
            if probe.models and (probe.models, probe.max_model_len) != (backend.served, backend.max_model_len):
                backend.served = probe.models
                backend.max_model_len = probe.max_model_len
                self._pools.clear()
                changed = True
            if changed:
                self.on_change()
            return
        backend.failed_polls += 1
        if backend.failed_polls >= UNHEALTHY_AFTER:
            backend.healthy = False

    def start(self) -> None:
        """Begin to poll every engine."""
        for backend in self.backends:
            self._urgent[backend.name] = asyncio.Event()
            self._polls.append(asyncio.create_task(self._poll(backend), name=f"poll {backend.name}"))

    async def _poll(self, backend: Backend) -> None:
        urgent = self._urgent[backend.name]
        while True:
            try:
                found = await self.probe(backend)
            except Exception:  # whatever goes wrong in asking, the engine's health is not known to be good
                found = Probe(ok=False)
            self.note(backend, found)
            urgent.clear()
            try:
                # A suspicious engine is asked again soon, a healthy one at its leisure.
                suspicious = backend.healthy and backend.failed_polls
                async with asyncio.timeout(URGENT_SECONDS if suspicious else self.poll_seconds):
                    await urgent.wait()
                await asyncio.sleep(URGENT_SECONDS)
            except TimeoutError:
                pass

    async def close(self) -> None:
        """Stop polling."""
        for poll in self._polls:
            poll.cancel()
        await asyncio.gather(*self._polls, return_exceptions=True)
        self._polls.clear()

    def breaker_states(self) -> dict[str, BreakerState]:
        """For the metric."""
        now = self.clock()
        return {backend.name: backend.breaker.state(now) for backend in self.backends}
