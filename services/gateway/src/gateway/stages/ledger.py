"""Stage 6: what it cost. Exactly one durable record per call that a key made.

`settle` is awaited before a client sees the end of its answer; `close` ends every other call without waiting. Between
admission and end a task notes the running usage of every held call a few times a second and renews its lease, so that a
crash loses nothing that was known. Calls that nobody's key made (401) leave no record: they cost nothing, belong to
nobody, and must not fill a disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from loguru import logger

from gateway.account import Days
from gateway.call import Call, Outcome, UsageRecord
from gateway.errors import LedgerUnavailable
from gateway.store import Store, StoreUnavailable

FLUSH_SECONDS = 0.25
OTHER_MODEL = "other"


class Models(Protocol):
    """What the ledger wants to know about models."""

    def serves(self, model: str) -> bool:
        """Whether a configured engine serves `model`."""
        ...


class Ledger:
    """Writes records. `live` are the calls that hold something, by request id."""

    def __init__(
        self,
        store: Store,
        models: Models,
        live: Mapping[str, Call],
        days: Days,
        *,
        hold_seconds: float = 900.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._models = models
        self._live = live
        self._days = days
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._noted: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.computed_tokens = 0
        """Tokens settled since this process started, as the engines count them."""

    @property
    def healthy(self) -> bool:
        """Whether usage can be recorded; while it is False no call is admitted."""
        return self._store.healthy

    # Life

    def start(self, tick: Callable[[], None]) -> None:
        """Begin to note running usage; `tick` (the budget's) is called as often."""
        self._task = asyncio.create_task(self._run(tick), name="ledger")

    async def stop(self) -> None:
        """Stop noting."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, tick: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                self.flush()
                tick()
            except Exception:
                logger.exception("ledger_tick_failed")

    def flush(self) -> None:
        """Note what changed since the last time, and renew leases in good time."""
        rows = []
        noted: dict[str, int] = {}
        now = self._clock()
        for request_id, call in self._live.items():
            hold = call.hold
            if hold is None or call.settled:
                continue
            usage = call.usage
            total = noted[request_id] = usage.total
            if total != self._noted.get(request_id, 0) or hold.expires_at - now < self._hold_seconds * 0.67:
                hold.expires_at = now + self._hold_seconds
                rows.append((request_id, usage.prompt, usage.completion, usage.cached, hold.expires_at))
        self._noted = noted
        if rows and self._store.healthy:
            self._store.progress(rows)

    # Ending a call

    async def settle(self, call: Call) -> None:
        """Record `call` durably; a second time it does nothing.

        Raises `LedgerUnavailable` if the record is neither in the database nor in the spool; even then it is kept in
        memory and tried again.
        """
        if call.settled or call.caller is None:
            return
        call.settled = True
        try:
            await self._store.settle(self._record(call))
        except StoreUnavailable:
            raise LedgerUnavailable("Usage cannot be recorded at the moment.") from None

    def close(self, call: Call) -> None:
        """Record `call` if nothing did so far, without waiting. Idempotent."""
        if call.settled or call.caller is None:
            return
        call.settled = True
        self._store.record(self._record(call), held=call.hold is not None)

    def _record(self, call: Call) -> UsageRecord:
        caller = call.caller
        assert caller is not None
        request = call.request
        usage = call.usage
        error = call.error
        hold = call.hold
        outcome = call.outcome or Outcome.OK
        self.computed_tokens += call.computed_tokens
        model = ""
        if request is not None:
            # A name that no engine has is the caller's text and stays out of the ledger.
            model = request.model if self._models.serves(request.model) else OTHER_MODEL
        status = call.status or (error.status if error is not None else 200 if outcome == Outcome.OK else 0)
        return UsageRecord(
            call.request_id,
            caller.key_id,
            caller.organisation,
            model,
            call.endpoint.name,
            usage.prompt,
            usage.completion,
            usage.cached,
            outcome,
            error.code if error is not None else None,
            status,
            request is not None and request.stream,
            call.started_at,
            time.perf_counter() - call.started,
            call.queue_seconds,
            None if call.first_token_at is None else call.first_token_at - call.started,
            None if call.trace is None else call.trace.trace_id,
            None if call.backend is None else call.backend.name,
            hold.day if hold is not None else self._days.today(),
        )
