"""The truth on disk: keys, holds, usage records, totals, audit. Nothing outside this package imports peewee.

`Store` is what the event loop talks to. Writes that calls wait for go through one writer thread with group commit;
everything else (admin, reports) runs on a connection of its own in a thread of the pool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from loguru import logger

from gateway.call import Usage, UsageRecord
from gateway.journal import Held, Journal, JournalFull, Slot
from gateway.settings import Settings
from gateway.spool import Spool
from gateway.store import accounts, batch, recovery, reports, seeding, writer
from gateway.store.connection import (
    Database,
    StoreLocked,
    StoreNewer,
    StoreUnavailable,
    Unsure,
    journal_path,
    spool_folder,
)
from gateway.store.retention import Retention
from gateway.store.schema import migrate
from gateway.store.writer import ENERGY, HOLDS, SETTLE, WORK, Writer, replay

__all__ = [
    "Database",
    "Started",
    "Store",
    "StoreLocked",
    "StoreNewer",
    "StoreUnavailable",
    "Unsure",
    "accounts",
    "migrate",
    "reports",
]

T = TypeVar("T")
POLL_SECONDS = 0.1  # a change by another process is noticed within this time
_SWEEP_SECONDS = 60.0
_WATCH_SECONDS = 0.25
_READ_SECONDS = 40.0  # PostgreSQL itself ends a statement after 30
_RECENT_IDS = 16_384  # request ids that are remembered at least, and at most twice as many
_MARK = (1 << 60) - 1  # a number of so many bits takes 32 bytes, a request id's text 96
_START_SECONDS = 120.0  # a large spool takes a while
_OWNERSHIP_PATIENCE = 3.0  # PostgreSQL needs a moment to see that a killed gateway has gone


@dataclass(slots=True)
class Started:
    """What a start found and did."""

    lost: int = 0
    """Calls of a dead process, settled at their last known usage."""
    replayed: int = 0
    """Records that a former process had kept aside."""
    seeded: dict[str, int] = field(default_factory=dict)
    damaged: str | None = None
    """Name of the damaged file that was set aside."""
    damaged_journal: str | None = None
    """Name of the journal that was set aside because it could not be read whole."""


class Store:
    """Keys and ledger of one database. Made on the event loop; every method is called on it.

    `on_keys` gets keys that changed, and whether those are all there are.
    """

    def __init__(self, settings: Settings, on_keys: Callable[[accounts.Changes, bool], None]) -> None:
        self._settings = settings
        self._on_keys = on_keys
        self._database = Database(settings.database_url, busy_seconds=2.0)
        self._spool = Spool(spool_folder(self._database, settings.spool_dir))
        self._journal = Journal(journal_path(self._database, self._spool.path.parent))
        self._recent: set[int] = set()  # of request ids, their hashes
        self._before: set[int] = set()
        self._writer: Writer | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._generation = -1
        self._live: Callable[[], frozenset[str]] = frozenset
        self._next_sweep = 0.0
        self._retention = Retention()

    # Life

    async def start(self, live: Callable[[], frozenset[str]] = frozenset) -> Started:
        """Open, migrate, recover and read the keys; then start the writer.

        `live` tells the request ids of running calls, so that the sweeper leaves their holds alone. Raises
        `StoreLocked` when another gateway owns the database, `StoreNewer`, or `StoreUnavailable`.
        """
        self._loop = asyncio.get_running_loop()
        self._live = live
        self._next_sweep = time.monotonic() + _SWEEP_SECONDS
        thread = Writer(self._database, self._spool, self._loop, self._open, self._poll, POLL_SECONDS)
        self._watcher = self._loop.create_task(self._watch(), name="store-watch")
        thread.start()
        try:
            started, changes = await thread.opened
        except BaseException:
            self._watcher.cancel()
            self._journal.close()
            self._database.disown()
            raise
        self._writer = thread
        self._on_keys(changes, True)
        return started  # type: ignore[no-any-return]

    def _open(self, database: Database) -> tuple[Started, accounts.Changes]:
        """In the writer's thread, on its connection, which stays open."""
        started = Started()
        if database.path is not None:
            database.own()  # before anything is looked at: a running gateway's file is not ours to judge
            if (what := recovery.damage(database.path)) is not None:
                aside = recovery.set_aside(database.path)
                database.connect()
                saved = recovery.rescue(aside, database)
                started.damaged = aside.name
                logger.error("database_damaged", problem=what, set_aside=str(aside), rescued=saved)
        database.connect()
        with database.limited(_START_SECONDS):
            return started, self._prepare(database, started)

    def _prepare(self, database: Database, started: Started) -> accounts.Changes:
        if not database.sqlite:
            self._own_patiently()
        migrate(database)
        if self._spool.count():
            started.replayed = replay(database, self._spool)
            logger.info("spool_replayed", records=started.replayed)
        self._recover(database, started)
        configured = self._settings.gateway_api_keys
        started.seeded = seeding.seed(database, configured.get_secret_value() if configured else None)
        if started.seeded["deleted"]:
            logger.warning("seeded_keys_deleted", keys=started.seeded["deleted"])
        self._generation = accounts.generation(database)
        return accounts.changes_since(database, -1)

    def _recover(self, database: Database, started: Started) -> None:
        """Settle what a dead process has left, then begin a journal of our own."""
        path = self._journal.path
        try:
            left = self._journal.open()
            started.lost = recovery.settle_orphans(database, time.time(), left=left)
            if started.lost:
                logger.warning("holds_settled", calls=started.lost)
            started.damaged_journal = self._journal.begin()
        except BlockingIOError:
            raise StoreLocked(f"another gateway uses {path}") from None
        except OSError as error:
            raise StoreUnavailable(f"the journal {path} cannot be used: {error}") from error
        if started.damaged_journal is not None:
            aside = str(path.with_name(started.damaged_journal))
            logger.error("journal_damaged", problem=self._journal.problem, set_aside=aside, settled=len(left))

    def _own_patiently(self) -> None:
        deadline = time.monotonic() + _OWNERSHIP_PATIENCE
        while True:
            try:
                return self._database.own()
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    async def close(self) -> None:
        """Commit what is queued, end the writer, give the database up."""
        if self._writer is not None:
            self._writer.stop()
            await asyncio.to_thread(self._writer.join)
            self._writer = None
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        self._journal.close()
        self._database.disown()

    # Calls: never blocking, answered when durable

    def knows(self, request_id: str) -> bool:
        """Whether a call with this request id has ended here not long ago."""
        mark = hash(request_id) & _MARK
        return mark in self._recent or mark in self._before

    def hold(self, held: Held) -> Slot:
        """Keep a call from now on, whatever happens to this process. Raises `StoreUnavailable` if there is no room."""
        try:
            return self._journal.take(held)
        except JournalFull as error:
            raise StoreUnavailable(str(error)) from None

    def settle(self, record: UsageRecord, slot: Slot | None = None) -> asyncio.Future[None]:
        """Record an ended call, once; its `slot` is freed. Resolved when durable (database or spool)."""
        self._remember(record.request_id)
        return self._running.submit(SETTLE, (record, slot))

    def record(self, record: UsageRecord, slot: Slot | None = None) -> None:
        """As `settle`, for a call whose end nobody waits for."""
        self._remember(record.request_id)
        self._running.send(SETTLE, (record, slot))

    def _remember(self, request_id: str) -> None:
        if len(self._recent) >= _RECENT_IDS:
            self._before, self._recent = self._recent, set()
        self._recent.add(hash(request_id) & _MARK)

    def note(self, calls: Iterable[tuple[Held, float, Usage]]) -> None:
        """Tell the database what calls under way hold, their leases (Unix seconds), and what they have used."""
        self._running.send(HOLDS, [batch.hold_row(held, lease, usage) for held, lease, usage in calls])

    def add_energy(self, rows: Sequence[batch.EnergyRow]) -> None:
        """Add joules to keys' days: `(day, key id, joules)`."""
        self._running.send(ENERGY, list(rows))

    @property
    def _running(self) -> Writer:
        assert self._writer is not None, "the store was not started"
        return self._writer

    @property
    def healthy(self) -> bool:
        """Whether new calls can be recorded."""
        thread = self._writer
        return thread is not None and thread.healthy

    @property
    def problem(self) -> str | None:
        """Why the store is not healthy, for an operator."""
        return None if self._writer is None else self._writer.problem

    @property
    def failures(self) -> int:
        """How often the database refused or stalled: `gateway_ledger_failures_total`."""
        return 0 if self._writer is None else self._writer.failures

    @property
    def folder(self) -> Path:
        """Where the spool lies: beside the database file, or SPOOL_DIR."""
        return self._spool.path.parent

    @property
    def aside(self) -> int:
        """Records that wait outside the database: `gateway_ledger_spool_records`."""
        return 0 if self._writer is None else self._writer.aside

    # Everything else

    async def read(self, work: Callable[[Database], T]) -> T:
        """Run a query on a connection of its own. Raises `StoreUnavailable`."""
        return await asyncio.to_thread(self._session, work)

    async def change(self, work: Callable[[Database], T]) -> T:
        """Run a change of keys and wait until the keys in memory have it. Raises `StoreUnavailable` if it was not made,
        and never will be; `Unsure` if nobody knows.

        It runs in the writer's thread, between two groups: on a connection of its own it would wait for the write lock
        for as long as calls keep coming.
        """

        def change(database: Database) -> T:
            result = work(database)
            try:
                self._poll(database)
            except StoreUnavailable as error:
                raise Unsure(str(error)) from None
            return result

        return await self._running.submit(WORK, change)  # type: ignore[no-any-return]

    def _session(self, work: Callable[[Database], T]) -> T:
        with self._database.session() as database, database.limited(_READ_SECONDS):
            return work(database)

    async def _watch(self) -> None:
        """End waits for a database that does not answer."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if cut := self._database.cut_overdue():
                logger.error("database_hangs", connections_cut=cut)
            if self._writer is not None:
                self._writer.watch()

    def _poll(self, database: Database) -> None:
        """In the writer's thread: load keys that changed; now and then sweep."""
        with database.limited(writer.COMMIT_SECONDS):
            now = accounts.generation(database)
            if now != self._generation:
                older = now < self._generation  # another database was put in its place: what was read counts no more
                changes = accounts.changes_since(database, -1 if older else self._generation)
                self._generation = now
                if older:
                    logger.warning("database_older", keys=len(changes))
                assert self._loop is not None
                self._loop.call_soon_threadsafe(self._on_keys, changes, older)
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + _SWEEP_SECONDS
            with database.limited(writer.WORK_SECONDS):
                lost = recovery.settle_orphans(database, time.time(), ours=self._ours())
                if lost:
                    logger.warning("holds_expired", calls=lost)
                self._forget(database)

    def _ours(self) -> Callable[[str], bool]:
        """Tells request ids of calls that run here, or whose records are on their way. In the writer's thread: a call
        that ends meanwhile is known before it is gone from those that run, so these are read first."""
        live = self._live()
        return lambda request_id: request_id in live or self.knows(request_id)

    def _forget(self, database: Database) -> None:
        days = self._settings.usage_retention_days
        if days and self._retention.forget(database, time.time() - days * 86_400):
            self._next_sweep = time.monotonic()  # more to do; other work goes first
