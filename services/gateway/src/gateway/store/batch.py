"""The statements of one group commit: many calls' rows in a few statements.

SQLite gives Python's lock away at every statement, and getting it back from a busy event loop costs more than the
statement, so rows travel in multi-row statements, in chunks of fixed sizes that stay in the statement cache.
"""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from gateway.call import Outcome, UsageRecord
from gateway.store.connection import Database, Run
from gateway.store.schema import HOLD_COLUMNS, TOTAL_COLUMNS, USAGE_COLUMNS

HoldRow = tuple[Any, ...]  # in the order of HOLD_COLUMNS
EnergyRow = tuple[str, str, float]  # day, key id, joules
ProgressRow = tuple[str, int, int, int, float]  # request id, prompt, completion, cached, lease (Unix seconds)

_CHUNKS = (64, 32, 16, 8, 4, 2, 1)


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


def _in_chunks(run: Run, text: Callable[[int], str], rows: Sequence[Sequence[Any]]) -> int:
    """Run `text(n)` over `rows`, n at a time; returns the number of changed rows."""
    changed = start = 0
    for size in _CHUNKS:
        while len(rows) - start >= size:
            part = rows[start : start + size]
            changed += run(text(size), list(chain.from_iterable(part))).rowcount
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


@dataclass(slots=True)
class Group:
    """What one transaction takes. `loose` are ids of records without a hold; `known` is filled with refused holds."""

    holds: list[HoldRow] = field(default_factory=list)
    progress: list[ProgressRow] = field(default_factory=list)
    records: list[UsageRecord] = field(default_factory=list)
    energy: list[EnergyRow] = field(default_factory=list)
    loose: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.holds or self.progress or self.records or self.energy)


def write(database: Database, group: Group) -> int:
    """One transaction: new holds, progress of running calls, ended calls, energy. Returns the records that were new.

    A record whose request id is already there changes nothing, so a group may be repeated when nobody knows whether its
    commit arrived; a `loose` one (a refusal, which has no hold to be unique by) gets an id of its own. A hold whose id
    is taken is not written and named in `group.known`.
    """
    try:
        return _write(database, group, careful=False)
    except _AlreadyThere:
        return _write(database, group, careful=True)


class _AlreadyThere(Exception):
    """An id of the group is taken: the transaction is repeated, looking for it first."""


def _write(database: Database, group: Group, *, careful: bool) -> int:
    with database.group() as run:
        if group.holds:
            _hold(run, group, careful)
        for request_id, prompt, completion, cached, lease in group.progress:
            run(_PROGRESS, (prompt, completion, cached, lease, request_id))
        if group.energy:
            _in_chunks(run, _add_energy, _energy(group.energy))
        if not group.records:
            return 0
        _in_chunks(run, _delete_holds, [(record.request_id,) for record in group.records])
        fresh = _fresh(run, group) if careful else group.records
        if _in_chunks(run, _insert_usage, [usage_row(record) for record in fresh]) != len(fresh):
            raise _AlreadyThere
        _in_chunks(run, _add_totals, totals(fresh))
        return len(fresh)


def _hold(run: Run, group: Group, careful: bool) -> None:
    rows = group.holds
    ids = [row[0] for row in rows]
    group.known = _known(run, "usage_records", ids)
    if careful:
        group.known |= _known(run, "holds", ids)
        counts = Counter(ids)
        group.known |= {request_id for request_id in ids if counts[request_id] > 1}  # neither of two is the first
    if group.known:
        rows = [row for row in rows if row[0] not in group.known]
    if _in_chunks(run, _insert_holds, rows) != len(rows):
        raise _AlreadyThere


def _known(run: Run, table: str, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    start = 0
    for size in _CHUNKS:  # fixed sizes, so that the statements stay prepared
        while len(ids) - start >= size:
            text = _find(table, size)
            found.update(request_id for (request_id,) in run(text, ids[start : start + size]).fetchall())
            start += size
    return found


@lru_cache(maxsize=64)
def _find(table: str, rows: int) -> str:
    return f"SELECT request_id FROM {table} WHERE request_id IN ({','.join('?' * rows)})"


def _fresh(run: Run, group: Group) -> list[UsageRecord]:
    known = _known(run, "usage_records", [record.request_id for record in group.records])
    fresh: list[UsageRecord] = []
    for record in group.records:
        if record.request_id in known:
            if record.request_id not in group.loose:
                continue
            record = replace(record, request_id=f"{record.request_id}.{secrets.token_hex(4)}")
        known.add(record.request_id)
        fresh.append(record)
    return fresh


def _energy(rows: Iterable[EnergyRow]) -> list[EnergyRow]:
    sums: dict[tuple[str, str], float] = {}
    for day, key_id, joules in rows:
        sums[day, key_id] = sums.get((day, key_id), 0.0) + joules
    return [(day, key_id, joules) for (day, key_id), joules in sorted(sums.items())]


@lru_cache(maxsize=64)
def _add_energy(rows: int) -> str:
    return (
        f"INSERT INTO daily_energy (day, key_id, joules) VALUES {_marks(3, rows)} "
        "ON CONFLICT (day, key_id) DO UPDATE SET joules = daily_energy.joules + excluded.joules"
    )
