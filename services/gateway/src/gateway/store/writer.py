"""The one writer: a thread that commits what the event loop hands it, in groups.

While one group is being committed the next one queues up, so the number of commits follows the disk and not the number
of calls. If the database refuses, ended calls go to the spool (fsynced), new holds are refused, and the thread tries
again until it has replayed the spool; only then are calls admitted again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from loguru import logger

from gateway.call import Outcome, UsageRecord
from gateway.errors import GatewayError, LedgerUnavailable
from gateway.spool import Spool
from gateway.store import batch
from gateway.store.connection import Database, StoreLocked, StoreUnavailable

HOLD, SETTLE, RECORD, PROGRESS, ENERGY, WORK, STOP = range(7)
_LARGEST_GROUP = 512
_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 2.0

Future = asyncio.Future[Any]
Item = tuple[int, Any, Future | None]
Answer = tuple[Future, Any, BaseException | None]


class Writer(threading.Thread):
    """Owns one connection. Everything public may be called from the event loop's thread."""

    def __init__(
        self,
        database: Database,
        spool: Spool,
        loop: asyncio.AbstractEventLoop,
        first: Callable[[Database], Any],
        poll: Callable[[Database], Any],
        poll_seconds: float,
    ) -> None:
        super().__init__(name="store-writer", daemon=True)
        self._database = database
        self._spool = spool
        self._loop = loop
        self._first = first
        self._poll = poll
        self._poll_seconds = poll_seconds
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self._unkept: list[UsageRecord] = []  # neither the database nor the spool took them yet
        self._durable: bool | None = None  # what the connection is set to; None = not known
        self._next_poll = 0.0
        self._next_try = 0.0
        self._retry_seconds = _RETRY_SECONDS
        self.opened: Future = loop.create_future()
        """Resolves with what `first` returned, or fails with what it raised; then the thread has ended."""
        self.healthy = True
        """False from the first failure until everything kept aside is in the database."""
        self.problem: str | None = None

    # From the loop

    def submit(self, kind: int, payload: Any) -> Future:
        """Queue one piece of work; the future resolves when it is durable, or fails with `StoreUnavailable`."""
        future: Future = self._loop.create_future()
        self._queue.put((kind, payload, future))
        return future

    def send(self, kind: int, payload: Any) -> None:
        """Queue one piece of work that nobody waits for."""
        self._queue.put((kind, payload, None))

    @property
    def waiting(self) -> int:
        """Pieces of work that no group has taken yet."""
        return self._queue.qsize()

    @property
    def aside(self) -> int:
        """Records that are not in the database yet: in the spool, or in memory because the spool refused too."""
        return self._spool.records + len(self._unkept)

    # The thread

    def run(self) -> None:
        """Open the database on this thread's connection, then commit groups until told to stop."""
        try:
            self._answer([(self.opened, self._first(self._database), None)])
        except Exception as error:  # whoever waits for the start has to hear of it
            self._database.close()
            self._answer([(self.opened, None, error)])
            return
        try:
            while self._turn():
                pass
        finally:
            self.healthy = False  # nobody may be admitted without a writer
            self._database.close()

    def _turn(self) -> bool:
        """One group, and what is due beside it; False when told to stop."""
        items = self._take()
        running = True
        if items and items[-1][0] == STOP:
            running = False
            items.pop()
        if items:
            self._group(items)
        now = time.monotonic()
        if not self.healthy:
            if now >= self._next_try or not running:
                self._guarded(self._heal)
        elif now >= self._next_poll:
            self._next_poll = now + self._poll_seconds
            self._guarded(lambda: self._poll(self._database))
        return running

    def _guarded(self, work: Callable[[], Any]) -> BaseException | None:
        """Run `work`; whatever goes wrong, the thread lives on and admission stops until it is healed."""
        try:
            work()
        except StoreUnavailable as error:
            self._broken(error)
            return error
        except Exception as error:
            logger.exception("store_failed")
            self._broken(StoreUnavailable(f"{type(error).__name__}"))
            return error
        return None

    def _take(self) -> list[Item]:
        wake = self._next_poll if self.healthy else self._next_try
        try:
            items = [self._queue.get(timeout=max(0.0, wake - time.monotonic()))]
        except Empty:
            return []
        while len(items) < _LARGEST_GROUP and items[-1][0] != STOP:
            try:
                items.append(self._queue.get_nowait())
            except Empty:
                break
        return items

    def _group(self, items: Sequence[Item]) -> None:
        answers: list[Answer] = []
        group = batch.Group()
        for kind, payload, _ in items:
            if kind == HOLD:
                group.holds.append(payload)
            elif kind in (SETTLE, RECORD):
                group.records.append(payload)
                if kind == RECORD:
                    group.loose.add(payload.request_id)
            elif kind == PROGRESS:
                group.progress += payload
            elif kind == ENERGY:
                group.energy += payload
        if group:
            failed = True
            if self.healthy:
                failed = self._guarded(partial(self._commit, group)) is not None
            refusal = StoreUnavailable(self.problem or "the database refuses") if failed else None
            lost = refusal
            if failed and self._keep(group.records):
                lost = None
            for kind, payload, future in items:
                if future is None:
                    continue
                if kind == HOLD:
                    answers.append((future, payload[0] not in group.known, refusal))
                elif kind == SETTLE:
                    answers.append((future, None, lost))
        answers += [self._work(work, future) for kind, work, future in items if kind == WORK and future is not None]
        self._answer(answers)

    def _work(self, work: Callable[[Database], Any], future: Future) -> Answer:
        """Run a change between two groups: it never has to fight them for the write lock."""
        result: Any = None
        refusal: GatewayError | None = None

        def run() -> None:
            nonlocal result, refusal
            if not self._durable:
                self._database.durable(True)
                self._durable = True
            try:
                result = work(self._database)
            except GatewayError as error:  # the change was wrong, not the database
                refusal = error

        if not self.healthy or self._guarded(run) is not None:
            return future, None, StoreUnavailable(self.problem or "the database refuses")
        return future, result, refusal

    def _commit(self, group: batch.Group) -> None:
        # Only what a client will rely on has to be on the disk; holds need to outlive this process alone.
        durable = bool(group.records)
        if durable != self._durable:
            self._database.durable(durable)
            self._durable = durable
        batch.write(self._database, group)

    def _answer(self, answers: list[Answer]) -> None:
        if not answers:
            return
        try:
            self._loop.call_soon_threadsafe(_resolve, answers)
        except RuntimeError:
            logger.warning("store_answers_unread", answers=len(answers))  # the loop has gone; the rows are safe

    def _keep(self, records: list[UsageRecord]) -> bool:
        """Spool `records`; False if even that failed (they stay in memory and are tried again)."""
        if not records:
            return True
        try:
            self._spool.append([*self._unkept, *records])
        except OSError as error:
            self._unkept += [_broken_off(record) for record in records]
            logger.error("spool_refused", error=str(error), records=len(self._unkept))
            return False
        self._unkept.clear()
        return True

    def _broken(self, error: StoreUnavailable) -> None:
        if self.healthy:
            logger.error("database_refused", error=str(error))
        self.healthy = False
        self.problem = str(error)
        self._next_try = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(self._retry_seconds * 2, _LONGEST_RETRY_SECONDS)
        self._durable = None
        self._database.close()

    def _heal(self) -> None:
        try:
            self._database.connect()
            self._database.own()
            replayed = replay(self._database, self._spool)
            if self._unkept:
                batch.write(self._database, batch.Group(records=self._unkept))
                replayed += len(self._unkept)
                self._unkept.clear()
            self._poll(self._database)
        except (StoreLocked, OSError) as error:  # OSError: the spool cannot be read
            raise StoreUnavailable(str(error)) from error
        self.problem = None
        self._retry_seconds = _RETRY_SECONDS
        self.healthy = True
        logger.info("database_healed", records=replayed)


def _broken_off(record: UsageRecord) -> UsageRecord:
    """The record of an answer whose end its caller did not get, because it could not be recorded in time."""
    if record.outcome != Outcome.OK:
        return record
    return replace(record, outcome=Outcome.FAILED, code=LedgerUnavailable.code, status=LedgerUnavailable.status)


def _resolve(answers: list[Answer]) -> None:
    """On the loop: tell those who still wait."""
    for future, result, error in answers:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def replay(database: Database, spool: Spool) -> int:
    """Write what the spool holds into the database and empty it; returns the number of records it held."""
    held = 0
    for part in spool.read():
        batch.write(database, batch.Group(records=part))
        held += len(part)
    if spool.torn:
        logger.warning("spool_lines_torn", lines=spool.torn)
    spool.clear()
    return held
