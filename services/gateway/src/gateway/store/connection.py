"""One database, SQLite or PostgreSQL, behind peewee: connections, transactions, errors, the lock of the one owner.

Statements use `?` for parameters everywhere. Every failure of a driver arrives as `StoreUnavailable`. A connection
belongs to the thread that opened it (peewee keeps one per thread).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import peewee

from gateway.store.schema import ENDED_CALLS

ROOM_BYTES = 1 << 20  # free on the disk before a database is opened on it
Row = tuple[Any, ...]
Run = Callable[..., Any]


class StoreUnavailable(Exception):
    """The database refuses or cannot be reached; nothing was changed."""


class Unsure(StoreUnavailable):
    """The database failed or stalled while it made a change: it may be made, or may still be."""


class Taken(Exception):
    """A value that has to be the only one is there already; nothing was changed."""


class StoreLocked(Exception):
    """Another gateway owns this database."""


class StoreNewer(Exception):
    """The database has a form that this program does not know."""


class Database:
    """Connections to the database of one `DATABASE_URL`."""

    OWNER_LOCK = 0x6761_7465_7761_7901  # advisory lock keys; any constants will do
    MIGRATION_LOCK = 0x6761_7465_7761_7902
    Newer = StoreNewer

    def __init__(self, url: str, *, busy_seconds: float = 5.0) -> None:
        self.sqlite = url.startswith("sqlite:///")
        self.path: Path | None = None
        self._lock_file: IO[str] | None = None
        self._database: Any
        if self.sqlite:
            self.path = Path(url.removeprefix("sqlite:///")).absolute()
            self._database = peewee.SqliteDatabase(
                str(self.path),
                # WAL: readers never wait for the writer. FULL: a commit has reached the disk when it returns.
                pragmas={
                    "journal_mode": "wal",
                    "synchronous": "full",
                    "wal_autocheckpoint": 2000,
                    "cache_size": -4_000,  # KiB, for each connection; decision 0171
                },
                lock_type="IMMEDIATE",
                timeout=busy_seconds,
                cached_statements=512,
            )
        else:
            self._database = peewee.PostgresqlDatabase(
                url,
                prefer_psycopg3=True,
                connect_timeout=3,
                application_name="gateway",
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=10_000,
                options="-c statement_timeout=30000 -c lock_timeout=5000",
            )
        self._url = url
        self._limited: dict[int, tuple[float, socket.socket]] = {}  # by thread: until when, and what to cut then
        self._cutting = threading.Lock()
        self._texts: dict[str, str] = {}
        self._formed: Any = None  # the connection that has the writer's own view and trigger
        password = urlsplit(url).password if not self.sqlite and "[" not in url else None
        self._hidden = [] if self.sqlite else [part for part in (url, password, unquote(password or "")) if part]
        self._failures: tuple[type[Exception], ...] = (peewee.PeeweeException, sqlite3.Error, OSError)
        if not self.sqlite:
            import psycopg  # only where it is used: it takes a while to load

            self._failures = (*self._failures, psycopg.Error)

    # Statements

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> Any:
        """Execute one statement on this thread's connection; returns the cursor (iterable, `rowcount`)."""
        with self.errors():
            return self._database.execute_sql(self._text(sql), parameters)

    def _text(self, sql: str) -> str:
        if self.sqlite:
            return sql
        text = self._texts.get(sql)
        if text is None:
            text = self._texts[sql] = sql.replace("?", "%s")
        return text

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[Row]:
        """All rows of a query."""
        cursor = self.run(sql, parameters)
        with self.errors():
            return list(cursor.fetchall())

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn every driver's failure into `StoreUnavailable`."""
        try:
            yield
        except self._failures as error:
            # Without the cause: a driver's message may repeat the URL, and with it the password.
            raise StoreUnavailable(f"{type(error).__name__}: {self._told(error)}") from None

    def _told(self, error: Exception) -> str:
        text = str(error)
        for secret in self._hidden:
            text = text.replace(secret, "********")
        return text[:300]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside, or none. SQLite takes its write lock at once."""
        with self.errors(), self._database.atomic():
            yield

    @contextmanager
    def group(self, *, alone: bool = False) -> Iterator[Run]:
        """A transaction for the writer: statements run on one cursor, without peewee's work around each of them.

        Yields `run(sql, parameters) -> cursor`; a cursor's rows must be read before the next statement. Raises `Taken`.
        `alone`: there will be one statement, which SQLite makes a transaction of by itself.
        """
        with self.errors():
            cursor = self._database.cursor()
            execute = cursor.execute
            if self.sqlite:
                self._make_forms(execute)
                # One of "many" is not asked for its last row's id, which would give Python's lock away once more.
                run = (lambda sql, parameters: cursor.executemany(sql, (parameters,))) if alone else execute
            else:
                text = self._text

                def run(sql: str, parameters: Sequence[Any] = ()) -> Any:
                    return execute(text(sql), parameters)

            try:
                if not alone:
                    execute("BEGIN IMMEDIATE" if self.sqlite else "BEGIN")
                yield run
                if not alone:
                    execute("COMMIT")
            except BaseException as error:
                if not alone:
                    with suppress(*self._failures):
                        execute("ROLLBACK")
                if isinstance(error, sqlite3.IntegrityError):
                    raise Taken from None
                raise

    def _make_forms(self, execute: Run) -> None:
        """Give a new connection what `schema.ENDED_CALLS` describes."""
        connection = self._database.connection()
        if connection is not self._formed:
            for statement in ENDED_CALLS:
                execute(statement)
            self._formed = connection

    def durable(self, wanted: bool) -> None:
        """Whether the next transactions of this thread wait for the disk. Called outside a transaction.

        Without it a commit still survives the death of this process, not the loss of power.
        """
        if self.sqlite:
            self.run("PRAGMA synchronous = FULL" if wanted else "PRAGMA synchronous = NORMAL")
        else:
            self.run("SET synchronous_commit = on" if wanted else "SET synchronous_commit = off")

    # Connections

    def connect(self) -> None:
        """Open this thread's connection, unless it is open."""
        self._need_folder()
        self._need_room()
        with self.errors():
            self._database.connect(reuse_if_open=True)

    def _need_folder(self) -> None:
        if self.path is not None and not self.path.parent.is_dir():
            raise StoreUnavailable(f"the folder {self.path.parent} does not exist")

    def _need_room(self) -> None:
        """Whoever opens an SQLite database first makes a file (`-shm`) that is mapped into memory. On a full disk with
        blocks below 4 kB that kills the process (SIGBUS); on any other the first record would fail."""
        if self.path is None or Path(f"{self.path}-shm").exists():
            return
        place = os.statvfs(self.path.parent)
        if place.f_bavail * place.f_frsize < ROOM_BYTES:
            raise StoreUnavailable(f"the disk of {self.path.parent} is full")

    def close(self) -> None:
        """Close this thread's connection; a broken one is dropped."""
        self._formed = None
        try:
            with self.errors():
                while self._database.transaction_depth():
                    self._database.pop_transaction()
                self._database.close()
        except StoreUnavailable:
            self._database._state.reset()  # peewee keeps a connection whose close failed; ours is gone either way

    @contextmanager
    def session(self) -> Iterator[Database]:
        """A connection for one piece of work on this thread."""
        self.connect()
        try:
            yield self
        finally:
            self.close()

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """What is done inside has this long; then `cut_overdue` cuts the connection, and it fails. May be nested.

        A server that hangs keeps its sockets alive, and no timeout of its own can end a wait for it. A file is left
        alone: nothing can end a wait for a disk.
        """
        if self.sqlite:
            yield
            return
        with self.errors():
            # A descriptor of our own: the driver may close its one, and the number may be somebody else's by then.
            own = socket.socket(fileno=os.dup(self._database.connection().fileno()))
        thread = threading.get_ident()
        outer = self._limited.get(thread)
        with self._cutting:
            self._limited[thread] = (time.monotonic() + seconds, own)
        try:
            yield
        finally:
            with self._cutting:
                if outer is None:
                    del self._limited[thread]
                else:
                    self._limited[thread] = outer
            own.close()

    def cut_overdue(self) -> int:
        """Cut connections whose work is overdue; returns how many. Any thread."""
        cut = 0
        with self._cutting:
            now = time.monotonic()
            for deadline, connection in self._limited.values():
                if now > deadline:
                    with suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
                        cut += 1
        return cut

    # The one owner

    def own(self) -> None:
        """Become the one gateway on this database. Raises `StoreLocked` if another one is."""
        if self.sqlite:
            assert self.path is not None
            self._need_folder()
            if self._lock_file is None:
                lock = self.path.with_name(self.path.name + ".lock")
                with self.errors():
                    file = open(lock, "a", encoding="utf-8")  # noqa: SIM115 - kept open: closing it gives the lock up
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    file.close()
                    raise StoreLocked(f"another gateway uses {self.path}") from None
                self._lock_file = file
        elif not self.rows("SELECT pg_try_advisory_lock(?)", (self.OWNER_LOCK,))[0][0]:
            raise StoreLocked("another gateway uses this PostgreSQL database")

    def disown(self) -> None:
        """Give the ownership up; on PostgreSQL it ends with the connection."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    @property
    def identity(self) -> str:
        """Eight hexadecimal digits that tell PostgreSQL databases apart; users and passwords may change."""
        parts = urlsplit(self._url)
        where = f"{parts.netloc.rpartition('@')[2]}{parts.path}?{parts.query}"
        return hashlib.blake2b(where.encode(), digest_size=4).hexdigest()

    @property
    def place(self) -> str:
        """Where the data is, for a log line: never a password."""
        return str(self.path) if self.path is not None else "postgresql"


def journal_path(database: Database, folder: Path) -> Path:
    """Where calls under way are kept: beside the SQLite file, for PostgreSQL in `folder` under the database's name."""
    if database.path is not None:
        return database.path.with_name(database.path.name + ".calls")
    return folder / f"usage-{database.identity}.calls"


def spool_folder(database: Database, configured: str | None) -> Path:
    """Where records are kept while the database refuses: `SPOOL_DIR`, else beside the SQLite file, else here."""
    if configured:
        return Path(configured)
    return database.path.parent if database.path is not None else Path(os.getcwd())
