"""Stage 6: what it cost. Exactly one durable record per call that a key made.

`settle` is awaited before a client sees the end of its answer; `close` ends every other call without waiting. Between
admission and end the journal has what was known of the call; calls that live for a while are also rows in the database,
with their lease, for the case that the machine dies and not only this process. Calls that nobody's key made (401) leave
no record: they cost nothing, belong to nobody, and must not fill a disk.
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
from gateway.journal import Slot
from gateway.store import Store, StoreUnavailable

FLUSH_SECONDS = 0.25
ROW_SECONDS = 0.05  # a call that ends sooner never becomes a row
NOTE_SECONDS = 1.0  # how old a row's usage may be
OTHER_MODEL = "other"
_MOST_TOKENS = 1 << 40  # more than any engine makes in one call; what a database cannot hold must not stop the ledger


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
        self._noted: dict[str, tuple[int, float]] = {}  # tokens in the row, and since when
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
        """Write or renew the rows of calls that live longer, and their leases in good time."""
        if not self._store.healthy:
            self._noted = {}  # rows on their way may not have arrived: all are written again
            return
        rows = []
        noted: dict[str, tuple[int, float]] = {}
        now = self._clock()
        moment = time.perf_counter()
        for request_id, call in self._live.items():
            hold = call.hold
            if hold is None or hold.slot is None or call.settled or moment - call.started < ROW_SECONDS:
                continue
            usage = call.usage
            total = usage.total
            last = self._noted.get(request_id)
            if last is not None:
                changed = total != last[0] and moment - last[1] >= NOTE_SECONDS
                if not changed and hold.expires_at - now >= self._hold_seconds * 0.67:
                    noted[request_id] = last
                    continue
            noted[request_id] = (total, moment)
            hold.expires_at = now + self._hold_seconds
            hold.slot.row = True
            rows.append((hold.slot.held, hold.expires_at, usage))
        self._noted = noted
        if rows:
            self._store.note(rows)

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
            await self._store.settle(self._record(call), _slot(call))
        except StoreUnavailable:
            raise LedgerUnavailable("Usage cannot be recorded at the moment.") from None

    def close(self, call: Call) -> None:
        """Record `call` if nothing did so far, without waiting. Idempotent."""
        if call.settled or call.caller is None:
            return
        call.settled = True
        self._store.record(self._record(call), _slot(call))

    def _record(self, call: Call) -> UsageRecord:
        caller = call.caller
        assert caller is not None
        request = call.request
        usage = call.usage
        if not (0 <= usage.prompt <= _MOST_TOKENS and 0 <= usage.completion <= _MOST_TOKENS):
            logger.error("usage_impossible", prompt=usage.prompt, completion=usage.completion)
            usage.prompt = min(max(usage.prompt, 0), _MOST_TOKENS)
            usage.completion = min(max(usage.completion, 0), _MOST_TOKENS)
        if not 0 <= usage.cached <= usage.prompt:
            usage.cached = min(max(usage.cached, 0), usage.prompt)
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
            str(outcome),  # a driver takes plain text without a detour
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


def _slot(call: Call) -> Slot | None:
    return None if call.hold is None else call.hold.slot
