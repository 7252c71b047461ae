"""The one writer: a thread that commits what the event loop hands it, in groups.

The loop hands over one group at a time. While the thread commits it the next one gathers on the loop, so the number of
commits follows the disk and not the number of calls, and the two threads meet a few times a group and not at each call:
each time the thread wants Python's lock from a busy loop costs both of them. If the database refuses, ended calls go to
the spool (fsynced), new holds are refused, and the thread tries again until it has replayed the spool; only then are
calls admitted again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import msgspec
from loguru import logger

from gateway import kernel
from gateway.call import Outcome, UsageRecord
from gateway.errors import GatewayError, LedgerUnavailable
from gateway.journal import Slot
from gateway.spool import Spool
from gateway.store import batch
from gateway.store.connection import Database, StoreLocked, StoreUnavailable, Unsure

SETTLE, HOLDS, ENERGY, WORK, STOP = range(5)
_LARGEST_GROUP = 512
_MOST_UNKEPT = 1_000  # records in memory, while neither the database nor the spool takes any
_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 2.0
COMMIT_SECONDS = 5.0  # what a group may take at PostgreSQL
WORK_SECONDS = 8.0  # … and anything else that calls may have to wait for
HEAL_SECONDS = 60.0  # a large spool takes a while
STALL_SECONDS = 10.0  # after which nobody waits for a group any longer, wherever it hangs

Future = asyncio.Future[Any]
Item = tuple[int, Any, Future | None]
Ended = tuple[UsageRecord, Slot | None]
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
        self._queue: SimpleQueue[list[Item]] = SimpleQueue()
        self._next: list[Item] = []  # the loop's: what the thread gets with the next group
        self._due: asyncio.Handle | None = None  # when it gets it; None while there is nothing, or no free thread
        self._given: list[Item] = []  # the loop's: the group that the thread has and has not answered
        self._begun: set[Future] = set()  # changes of the group at hand that were begun
        self._claim = threading.Lock()  # between the decision to make a change and the one to refuse it
        self._unkept: list[Ended] = []  # neither the database nor the spool took them yet
        self._durable: bool | None = None  # what the connection is set to; None = not known
        self._busy_since: float | None = None  # monotonic; None = nothing is being written
        self._next_poll = 0.0
        self._next_try = 0.0
        self._retry_seconds = _RETRY_SECONDS
        self.opened: Future = loop.create_future()
        """Resolves with what `first` returned, or fails with what it raised; then the thread has ended."""
        self.healthy = True
        """False from the first failure until everything kept aside is in the database."""
        self.problem: str | None = None
        self.failures = 0
        """How often the database refused or stalled, attempts to heal it included."""

    # From the loop

    def submit(self, kind: int, payload: Any) -> Future:
        """Queue one piece of work; the future resolves when it is durable, or fails with `StoreUnavailable`."""
        future: Future = self._loop.create_future()
        self.send(kind, payload, future)
        return future

    def send(self, kind: int, payload: Any, future: Future | None = None) -> None:
        """Queue one piece of work that nobody waits for."""
        self._next.append((kind, payload, future))
        if self._due is None and not self._given:
            self._due = self._loop.call_soon(self._hand_over)  # for all calls that end in this turn

    def stop(self) -> None:
        """Let the thread end after what is queued."""
        self._next.append((STOP, None, None))
        self._queue.put(self._next)
        self._next = []

    def _hand_over(self) -> None:
        self._due = None
        if self._next:
            self._given = self._next[:_LARGEST_GROUP]
            del self._next[:_LARGEST_GROUP]
            self._queue.put(self._given)

    def _answered(self, answers: list[Answer]) -> None:
        """The thread is free again: tell those who still wait, and let it have what has gathered."""
        self._given = []
        _resolve(answers)
        if self._due is None:
            self._hand_over()

    def watch(self) -> None:
        """Now and then: whoever waits for a group that does not end is told so, and nobody is admitted until it has."""
        since = self._busy_since
        if since is None or time.monotonic() - since < STALL_SECONDS:
            return
        if self.healthy:
            logger.error("database_stalls", seconds=round(time.monotonic() - since, 1))
            self.failures += 1
        self.healthy = False  # the thread heals it when it is back
        self.problem = "the database does not answer"
        refusal, unsure = StoreUnavailable(self.problem), Unsure(self.problem)
        with self._claim:
            waiting = [future for _, _, future in self._given + self._next if future is not None]
            _resolve([(future, None, unsure if future in self._begun else refusal) for future in waiting])

    @property
    def aside(self) -> int:
        """Records that are not in the database yet: in the spool, or in memory because the spool refused too."""
        return self._spool.records + len(self._unkept)

    # The thread

    def run(self) -> None:
        """Open the database on this thread's connection, then commit groups until told to stop."""
        kernel.stand_back()
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
        self._busy_since = time.monotonic()
        if items:
            self._group(items)
        now = time.monotonic()
        if not self.healthy:
            if now >= self._next_try or not running:
                self._guarded(self._heal)
        elif now >= self._next_poll:
            self._next_poll = now + self._poll_seconds
            self._guarded(lambda: self._poll(self._database))
        self._busy_since = None
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
            return self._queue.get(timeout=max(0.0, wake - time.monotonic()))
        except Empty:
            return []

    def _group(self, items: Sequence[Item]) -> None:
        answers: list[Answer] = []
        self._begun = set()
        group = batch.Group()
        ended: list[Ended] = []
        for kind, payload, _ in items:
            if kind == SETTLE:
                ended.append(payload)
                record, slot = payload
                group.records.append(record)
                if slot is not None and slot.row:
                    group.ended.append(record.request_id)
            elif kind == HOLDS:
                for row in payload:
                    group.holds[row[0]] = row
            elif kind == ENERGY:
                group.energy += payload
        if group:
            lost: StoreUnavailable | None = None
            if self.healthy and self._guarded(partial(self._commit, group)) is None:
                _free(ended)
            elif not self._keep(ended):
                lost = StoreUnavailable(self.problem or "the database refuses")
            answers = [(future, None, lost) for kind, _, future in items if kind == SETTLE and future is not None]
        answers += [self._work(work, future) for kind, work, future in items if kind == WORK and future is not None]
        self._answer(answers)

    def _work(self, work: Callable[[Database], Any], future: Future) -> Answer:
        """Run a change between two groups: it never has to fight them for the write lock.

        Nobody waits for it any longer: it was refused, or who asked has gone. Then it is not made.
        """
        result: Any = None
        refusal: GatewayError | None = None

        def run() -> None:
            nonlocal result, refusal
            try:
                if not self._durable:
                    self._database.durable(True)
                    self._durable = True
                with self._database.limited(WORK_SECONDS):
                    result = work(self._database)
            except GatewayError as error:  # the change was wrong, not the database
                refusal = error

        with self._claim:
            if future.done() or not self.healthy:
                return future, None, StoreUnavailable(self.problem or "the database refuses")
            self._begun.add(future)
        problem = self._guarded(run)
        if problem is None:
            return future, result, refusal
        # A server that failed may have committed before; a file has not, unless the failure says so itself.
        told = StoreUnavailable if self._database.sqlite and not isinstance(problem, Unsure) else Unsure
        return future, None, told(self.problem or "the database refuses")

    def _commit(self, group: batch.Group) -> None:
        # Only what a client will rely on has to be on the disk; holds need to outlive this process alone.
        durable = bool(group.records)
        with self._database.limited(COMMIT_SECONDS):
            if durable != self._durable:
                self._database.durable(durable)
                self._durable = durable
            batch.write(self._database, group)

    def _answer(self, answers: list[Answer]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._answered, answers)
        except RuntimeError:
            logger.warning("store_answers_unread", answers=len(answers))  # the loop has gone; the rows are safe

    def _keep(self, ended: list[Ended]) -> bool:
        """Spool the records; False if even that failed (they stay in memory and are tried again)."""
        if not ended:
            return True
        ended = [*self._unkept, *ended]
        try:
            self._spool.append([record for record, _ in ended])
        except OSError as error:
            self._unkept += [(_broken_off(record), slot) for record, slot in ended[len(self._unkept) :]]
            dropped = self._drop_refusals()
            logger.error("spool_refused", error=str(error), records=len(self._unkept), dropped=dropped)
            return False
        self._unkept.clear()
        _free(ended)
        return True

    def _drop_refusals(self) -> int:
        """Nothing is admitted, but callers ask again: beyond a limit the records of refusals go, which cost nothing."""
        if len(self._unkept) <= _MOST_UNKEPT:
            return 0
        refusals = [ended for ended in self._unkept if ended[0].outcome == Outcome.REFUSED]
        self._unkept = [ended for ended in self._unkept if ended[0].outcome != Outcome.REFUSED]
        _free(refusals)
        return len(refusals)

    def _broken(self, error: StoreUnavailable) -> None:
        if self.healthy:
            logger.error("database_refused", error=str(error))
        self.failures += 1
        self.healthy = False
        self.problem = str(error)
        self._next_try = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(self._retry_seconds * 2, _LONGEST_RETRY_SECONDS)
        self._durable = None
        self._database.close()

    def _heal(self) -> None:
        try:
            self._database.connect()
            with self._database.limited(COMMIT_SECONDS):
                self._database.own()
            with self._database.limited(HEAL_SECONDS):
                replayed = replay(self._database, self._spool)
                if self._unkept:
                    batch.write(self._database, batch.kept_aside([record for record, _ in self._unkept]))
                    replayed += len(self._unkept)
                    _free(self._unkept)
                    self._unkept.clear()
                self._poll(self._database)
        except (StoreLocked, OSError) as error:  # OSError: the spool cannot be read
            raise StoreUnavailable(str(error)) from error
        self.problem = None
        self._retry_seconds = _RETRY_SECONDS
        self.healthy = True
        logger.info("database_healed", records=replayed)


def _free(ended: Sequence[Ended]) -> None:
    """Their records are durable: the journal need not keep these calls any longer."""
    for _, slot in ended:
        if slot is not None:
            slot.free()


def _broken_off(record: UsageRecord) -> UsageRecord:
    """The record of an answer whose end its caller did not get, because it could not be recorded in time."""
    if record.outcome != Outcome.OK:
        return record
    why = LedgerUnavailable
    return msgspec.structs.replace(record, outcome=Outcome.FAILED, code=why.code, status=why.status)


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
        batch.write(database, batch.kept_aside(part))
        held += len(part)
    if spool.torn:
        logger.warning("spool_lines_torn", lines=spool.torn)
    spool.clear()
    return held
