"""What a start finds: a damaged file, records in the spool, holds of a process that died.

A damaged SQLite file is never written to again: it is moved aside with its WAL, everything that can still be read is
copied into a new one, and the loss is reported in the log and in the audit table.
"""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from gateway.call import Outcome, UsageRecord
from gateway.journal import Held, Left
from gateway.store import batch
from gateway.store.connection import Database, StoreUnavailable
from gateway.store.schema import HOLD_COLUMNS, TABLES, WHO_MADE_AND_ENDED, migrate

CHECK_SECONDS = 0.4  # start-up after a crash stays under a second however large the ledger is


def damage(path: Path) -> str | None:
    """What is wrong with the SQLite file, or None. All tables are read whole but the ledger, which gets a while."""
    if not path.exists() or path.stat().st_size == 0:
        return None
    deadline = time.monotonic() + CHECK_SECONDS
    try:
        connection = sqlite3.connect(path, timeout=5, isolation_level=None)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            for table in TABLES:
                if table not in tables:
                    continue
                if table == TABLES[-1]:
                    connection.set_progress_handler(lambda: time.monotonic() > deadline, 100_000)
                found = [row[0] for row in connection.execute(f"PRAGMA quick_check({table})")]
                if found != ["ok"]:
                    return f"{table}: {found[0]}"
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            return None  # time is up and nothing was wrong so far
        raise StoreUnavailable(str(error)) from error  # locked, unreadable: no sign of damage
    except sqlite3.DatabaseError as error:
        return str(error)
    return None


def set_aside(path: Path) -> Path:
    """Move the file with its WAL out of the way; returns its new name."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 0
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    for suffix in ("-wal", "-shm", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(target.with_name(target.name + suffix))
    return target


def rescue(damaged: Path, database: Database) -> dict[str, int]:
    """Copy every row that can still be read from `damaged` into the new `database`; returns rows by table.

    The damaged file is opened read-only in the sense that nothing of it is changed on purpose; its WAL may be read.
    """
    saved: dict[str, int] = {}
    there: dict[str, list[str]] = {}
    migrate(database)
    source = sqlite3.connect(damaged, isolation_level=None)
    try:
        for table in TABLES:
            columns = there[table] = _columns(source, database, table)
            saved[table] = 0
            with database.transaction():
                if table == "meta":
                    database.run("DELETE FROM meta")
                for row in _readable(source, table, columns):
                    marks = ", ".join("?" * len(columns))
                    text = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT DO NOTHING"
                    saved[table] += max(0, database.run(text, row).rowcount)
                if table == "meta" and not saved[table]:
                    database.run("INSERT INTO meta (name, value) VALUES ('generation', 1)")
    finally:
        source.close()
    with database.transaction():
        if "made_by" not in there["key_secrets"]:
            for statement in WHO_MADE_AND_ENDED:
                database.run(statement)
        database.run(
            "UPDATE meta SET value = MAX(value, (SELECT COALESCE(MAX(generation), 0) FROM keys)) "
            "WHERE name = 'generation'"
        )
        database.run(
            "INSERT INTO audit (at, actor, action, subject, details) VALUES (?, 'gateway', 'database_damaged', ?, ?)",
            (time.time(), damaged.name, msgspec.json.encode(saved).decode()),
        )
    return saved


def _columns(source: sqlite3.Connection, database: Database, table: str) -> list[str]:
    """The columns that both have: the damaged file may be of an older form."""
    wanted = [row[1] for row in database.rows(f"PRAGMA table_info({table})")]
    try:
        found = {row[1] for row in source.execute(f"PRAGMA table_info({table})")}
    except sqlite3.DatabaseError:  # not a database at all; reading its rows says so
        return wanted
    return [name for name in wanted if name in found] or wanted


def _readable(source: sqlite3.Connection, table: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    for order in ("ASC", "DESC"):  # from both ends, so that one bad page in the middle hides only itself
        try:
            yield from source.execute(f"SELECT {', '.join(columns)} FROM {table} ORDER BY {columns[0]} {order}")
        except sqlite3.DatabaseError as error:
            logger.error("database_rows_lost", table=table, error=str(error))
            continue
        return


def settle_orphans(
    database: Database,
    now: float,
    *,
    left: Sequence[Left] = (),
    ours: Callable[[str], bool] | None = None,
) -> int:
    """Settle calls that nobody runs any more at their last known usage, outcome `lost`; returns how many.

    At start (this process is the only owner) those are all that the journal has (`left`) and all rows of `holds`, which
    outlive the loss of the journal; of a call that is in both the larger usage counts. Later, with `ours`, those whose
    lease is over and whose request id is not `ours`: a lease ends by the time of day, which may step.
    """
    text = f"SELECT {', '.join(HOLD_COLUMNS)} FROM holds" + (" WHERE expires_at < ?" if ours else "")
    rows = {row[0]: dict(zip(HOLD_COLUMNS, row, strict=True)) for row in database.rows(text, (now,) if ours else ())}
    records = []
    for call in left:
        known = (call.prompt, call.completion, call.cached)
        row = rows.get(call.held.request_id)
        if row is not None and row["started_at"] == call.held.started_at:
            del rows[call.held.request_id]
            noted = (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"])
            known = max(known, noted, key=lambda usage: usage[0] + usage[1])
        records.append(_lost(call.held, known, now))
    for row in rows.values():
        if ours is None or not ours(row["request_id"]):
            held = Held(
                **{name: row[name] for name in Held.__struct_fields__ if name != "stream"}, stream=bool(row["stream"])
            )
            records.append(_lost(held, (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]), now))
    return sum(batch.write(database, batch.kept_aside(records[at : at + 500])) for at in range(0, len(records), 500))


def _lost(held: Held, usage: tuple[int, int, int], now: float) -> UsageRecord:
    return UsageRecord(
        request_id=held.request_id,
        key_id=held.key_id,
        organisation=held.organisation,
        model=held.model,
        endpoint=held.endpoint,
        prompt_tokens=usage[0],
        completion_tokens=usage[1],
        cached_tokens=usage[2],
        outcome=Outcome.LOST,
        code=None,
        status=0,
        stream=held.stream,
        started_at=held.started_at,
        duration_seconds=max(0.0, now - held.started_at),
        queue_seconds=0.0,
        first_token_seconds=None,
        trace_id=held.trace_id,
        backend=None,
        day=held.day,
    )
