"""The statements of one group commit: many calls' rows in a few statements.

SQLite gives Python's lock away at every statement, and getting it back from a busy event loop costs more than the
statement, so rows travel in multi-row statements, in chunks of fixed sizes that stay in the statement cache.
"""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from gateway.call import Outcome, UsageRecord
from gateway.store.connection import Database
from gateway.store.schema import HOLD_COLUMNS, TOTAL_COLUMNS, USAGE_COLUMNS

HoldRow = tuple[Any, ...]  # in the order of HOLD_COLUMNS
ProgressRow = tuple[str, int, int, int, float]  # request id, prompt, completion, cached, lease (Unix seconds)

_CHUNKS = (64, 16, 4, 1)


def _marks(columns: int, rows: int) -> str:
    row = "(" + ",".join("?" * columns) + ")"
    return ",".join([row] * rows)


@lru_cache(maxsize=64)
def _insert_holds(rows: int) -> str:
    columns = ", ".join(HOLD_COLUMNS)
    return f"INSERT INTO holds ({columns}) VALUES {_marks(len(HOLD_COLUMNS), rows)} ON CONFLICT (request_id) DO NOTHING"


@lru_cache(maxsize=64)
def _delete_holds(rows: int) -> str:
    return f"DELETE FROM holds WHERE request_id IN ({','.join('?' * rows)})"


@lru_cache(maxsize=64)
def _insert_usage(rows: int) -> str:
    columns = ", ".join(USAGE_COLUMNS)
    marks = _marks(len(USAGE_COLUMNS), rows)
    return f"INSERT INTO usage_records ({columns}) VALUES {marks} ON CONFLICT (request_id) DO NOTHING"


@lru_cache(maxsize=64)
def _add_totals(rows: int) -> str:
    columns = ", ".join(TOTAL_COLUMNS)
    sums = ", ".join(f"{name} = daily_totals.{name} + excluded.{name}" for name in TOTAL_COLUMNS[4:])
    return (
        f"INSERT INTO daily_totals ({columns}) VALUES {_marks(len(TOTAL_COLUMNS), rows)} "
        f"ON CONFLICT (day, key_id, organisation, model) DO UPDATE SET {sums}"
    )


_PROGRESS = (
    "UPDATE holds SET prompt_tokens = ?, completion_tokens = ?, cached_tokens = ?, expires_at = ? WHERE request_id = ?"
)


def _in_chunks(database: Database, text: Callable[[int], str], rows: Sequence[Sequence[Any]]) -> int:
    """Run `text(n)` over `rows`, n at a time; returns the number of changed rows."""
    changed = start = 0
    for size in _CHUNKS:
        while len(rows) - start >= size:
            part = rows[start : start + size]
            changed += database.run(text(size), list(chain.from_iterable(part))).rowcount
            start += size
    return changed


def usage_row(record: UsageRecord) -> tuple[Any, ...]:
    """A record in the order of `USAGE_COLUMNS`."""
    return (
        record.request_id,
        record.key_id,
        record.organisation,
        record.model,
        record.endpoint,
        record.prompt_tokens,
        record.completion_tokens,
        record.cached_tokens,
        record.outcome,
        record.code,
        record.status,
        int(record.stream),
        record.started_at,
        record.duration_seconds,
        record.queue_seconds,
        record.first_token_seconds,
        record.trace_id,
        record.backend,
        record.day,
    )


def totals(records: Iterable[UsageRecord]) -> list[tuple[Any, ...]]:
    """Records added up by day, key, organisation and model, in the order of `TOTAL_COLUMNS`.

    `requests` counts what was admitted, `refusals` what was not.
    """
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for r in records:
        total = sums.setdefault((r.day, r.key_id, r.organisation or "", r.model), [0, 0, 0, 0, 0])
        total[0] += r.prompt_tokens
        total[1] += r.completion_tokens
        total[2] += r.cached_tokens
        total[4 if r.outcome == Outcome.REFUSED else 3] += 1
    # Sorted, so that two writers on PostgreSQL take row locks in the same order.
    return [(*names, *numbers) for names, numbers in sorted(sums.items())]


def write(
    database: Database, holds: Sequence[HoldRow], progress: Sequence[ProgressRow], records: Sequence[UsageRecord]
) -> int:
    """One transaction: new holds, progress of running calls, ended calls. Returns the records that were new.

    A record whose request id is already there changes nothing, so a batch may be repeated when nobody knows whether its
    commit arrived.
    """
    try:
        return _write(database, holds, progress, records, careful=False)
    except _AlreadyThere:
        return _write(database, holds, progress, records, careful=True)


class _AlreadyThere(Exception):
    """Some records were settled before: the transaction is repeated, looking for them first."""


def _write(
    database: Database,
    holds: Sequence[HoldRow],
    progress: Sequence[ProgressRow],
    records: Sequence[UsageRecord],
    *,
    careful: bool,
) -> int:
    with database.transaction():
        if holds:
            _in_chunks(database, _insert_holds, holds)
        for request_id, prompt, completion, cached, lease in progress:
            database.run(_PROGRESS, (prompt, completion, cached, lease, request_id))
        if not records:
            return 0
        _in_chunks(database, _delete_holds, [(record.request_id,) for record in records])
        fresh = _fresh(database, records) if careful else records
        inserted = _in_chunks(database, _insert_usage, [usage_row(record) for record in fresh])
        if inserted != len(fresh):
            raise _AlreadyThere
        _in_chunks(database, _add_totals, totals(fresh))
        return inserted


def _fresh(database: Database, records: Sequence[UsageRecord]) -> list[UsageRecord]:
    by_id = {record.request_id: record for record in reversed(records)}  # the first of two wins
    ids = list(by_id)
    for start in range(0, len(ids), 500):
        part = ids[start : start + 500]
        marks = ",".join("?" * len(part))
        for (known,) in database.rows(f"SELECT request_id FROM usage_records WHERE request_id IN ({marks})", part):
            by_id.pop(known, None)
    return list(by_id.values())
