"""The nouns of the gateway: what a call is, who makes it, what it may spend, what it used, how it ended.

Plain data without I/O. The stages read and fill one `Call`; nothing else travels between them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.errors import GatewayError
    from gateway.journal import Slot
    from gateway.wire import Endpoint, Request

_timings: dict[tuple[str, ...], bytes] = {}  # how a call's stages are told, by which there were
STAGES = ("auth", "budget", "capacity", "dispatch", "forward", "ledger")


class Outcome(StrEnum):
    """How a call ended: a metric label, a log field and a ledger column."""

    OK = "ok"  # answered whole
    REJECTED = "rejected"  # the engine refused the request (4xx of vLLM)
    REFUSED = "refused"  # refused by us: caller's or capacity family
    CANCELLED = "cancelled"  # the client went away
    REVOKED = "revoked"  # the key was disabled while the call ran
    FAILED = "failed"  # engine or gateway failure
    INTERRUPTED = "interrupted"  # cut by our shutdown
    LOST = "lost"  # the gateway died; settled from its hold at the next start


class Priority(StrEnum):
    """Priority classes, best first. A caller may lower its class, never raise it."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one key may do; 0 means no limit. `daily_tokens` counts prompt and completion."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0
    daily_tokens: int = 0
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """A key as the stages see it: identity and effective limits (defaults filled in). Never a secret."""

    key_id: str
    name: str
    limits: Limits = field(default_factory=Limits)
    organisation: str | None = None
    organisation_daily_tokens: int = 0
    models: frozenset[str] | None = None  # None = all
    priority: Priority = Priority.NORMAL
    weight: int = 1
    disabled: bool = False
    expires_at: float | None = None  # Unix seconds


@dataclass(slots=True)
class Usage:
    """Tokens as the engine reported them; `known` is False while it has said nothing."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    known: bool = False

    @property
    def total(self) -> int:
        """Prompt and completion tokens."""
        return self.prompt + self.completion

    def keep_to(self, limit: int) -> None:
        """Count at most `limit` tokens: what an engine did beyond what it was allowed is not its caller's to pay."""
        self.prompt = min(self.prompt, limit)
        self.completion = min(self.completion, limit - self.prompt)


@dataclass(slots=True)
class Hold:
    """What a call has taken and must give back: an upper bound of tokens until the truth is known.

    `tokens` were held against the quota day `day` (ISO date in QUOTA_TIMEZONE). `slot` is the call's place in the
    journal, None until it is kept there.
    """

    request_id: str
    key_id: str
    tokens: int
    day: str
    expires_at: float  # Unix seconds: the lease
    slot: Slot | None = None


class UsageRecord(msgspec.Struct, frozen=True):
    """One row of the ledger, in the order of its columns. Times are Unix seconds, durations seconds, tokens as the
    engine counted them."""

    request_id: str
    key_id: str
    organisation: str | None
    model: str
    endpoint: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    outcome: str
    code: str | None
    status: int
    stream: bool
    started_at: float
    duration_seconds: float
    queue_seconds: float
    first_token_seconds: float | None
    trace_id: str | None
    backend: str | None
    day: str


def _nowhere(usage: Usage) -> None:
    """Nothing is held, nothing is kept."""


class Call:
    """One request on its way through the stages. Owned by one task; `abort` may be called from elsewhere."""

    __slots__ = (
        "answer",
        "backend",
        "caller",
        "cause",
        "counted",
        "endpoint",
        "error",
        "first_token_at",
        "grant",
        "hold",
        "ip",
        "limit_lines",
        "loop_lag",
        "mark",
        "note",
        "outcome",
        "queue_seconds",
        "request",
        "request_id",
        "settled",
        "spans",
        "stage",
        "stage_seconds",
        "started",
        "started_at",
        "status",
        "task",
        "trace",
        "usage",
    )

    def __init__(self, request_id: str, endpoint: Endpoint, ip: str) -> None:
        self.request_id = request_id
        self.endpoint = endpoint
        self.ip = ip
        self.started = self.mark = perf_counter()
        self.started_at = time()
        self.caller: Caller | None = None
        self.request: Request | None = None
        self.hold: Hold | None = None
        self.grant: Any = None  # capacity's receipt for a place in the engine
        self.backend: Any = None  # dispatch's choice
        self.answer: Any = None  # the stream under way, which knows how to end broken
        self.limit_lines = b""  # x-ratelimit-* as header lines, set by the budget stage
        self.loop_lag = 0.0  # seconds: how late the event loop ran when the call came
        self.usage = Usage()
        self.note: Callable[[Usage], None] = _nowhere  # keeps the running usage, set by the budget stage
        self.outcome: Outcome | None = None
        self.error: GatewayError | None = None  # what the caller was, or would have been, told
        self.cause: GatewayError | None = None  # why `abort` cancelled the task
        self.status = 0
        self.counted = False  # among the day's requests, although it held nothing
        self.stage = "auth"
        self.stage_seconds: dict[str, float] = {}
        self.queue_seconds = 0.0
        self.first_token_at: float | None = None  # perf_counter
        self.settled = False
        self.task: asyncio.Task[Any] | None = None
        self.trace: Any = None  # telemetry's context
        self.spans: Any = None

    def enter(self, stage: str) -> None:
        """Close the running stage's clock and start `stage`'s."""
        now = perf_counter()
        seconds = self.stage_seconds
        running = self.stage
        if running in seconds:
            seconds[running] += now - self.mark
        else:
            seconds[running] = now - self.mark
        self.stage = stage
        self.mark = now

    def server_timing(self) -> bytes:
        """Where the time went so far, in milliseconds: the event loop's lateness, the stages, the whole."""
        now = perf_counter()
        seconds = self.stage_seconds.copy()
        seconds[self.stage] = seconds.get(self.stage, 0.0) + now - self.mark
        kinds = tuple(seconds)
        form = _timings.get(kinds)
        if form is None:
            stages = b"".join(b"%b;dur=%%.2f, " % stage.encode() for stage in kinds)
            form = _timings[kinds] = b"loop;dur=%.2f, " + stages + b"total;dur=%.2f"
        parts = [value * 1e3 for value in seconds.values()]
        return form % (self.loop_lag * 1e3, *parts, (now - self.started) * 1e3)

    @property
    def computed_tokens(self) -> int:
        """Tokens as the engine counts them: the prompt once for each choice."""
        choices = self.request.choices if self.request is not None else 1
        return self.usage.prompt * choices + self.usage.completion

    def abort(self, cause: GatewayError) -> None:
        """End the call from outside (client left, key revoked, gateway stops). The first cause wins."""
        if self.cause is None and self.task is not None and not self.task.done():
            self.cause = cause
            self.task.cancel()

    def __repr__(self) -> str:
        return f"<Call {self.request_id} {self.endpoint.name} stage={self.stage} outcome={self.outcome}>"
