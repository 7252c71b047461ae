"""The statements of one group commit: many calls' rows in a few statements.

SQLite gives Python's lock away at every statement, and getting it back from a busy event loop costs more than the
statement. So rows travel in multi-row statements, and on SQLite a group of the usual kind, calls that have ended, is
one statement in all, which is its own transaction (`schema.ENDED_CALLS`): Python's lock is away until the disk has it.
"""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec

from gateway.call import Outcome, Usage, UsageRecord
from gateway.journal import Held
from gateway.store.connection import Database, Run, Taken
from gateway.store.schema import HOLD_COLUMNS, TOTAL_COLUMNS, USAGE_COLUMNS

HoldRow = tuple[Any, ...]  # in the order of HOLD_COLUMNS
EnergyRow = tuple[str, str, float]  # day, key id, joules

_STREAM = USAGE_COLUMNS.index("stream")
_MOST_ROWS = 64  # of one statement: as many forms of it at most, all of which stay prepared


def _marks(columns: int, rows: int) -> str:
    row = "(" + ",".join("?" * columns) + ")"
    return ",".join([row] * rows)


@lru_cache(maxsize=64)
def _put_holds(rows: int) -> str:
    columns = ", ".join(HOLD_COLUMNS)
    news = ", ".join(f"{name} = excluded.{name}" for name in ("expires_at", *HOLD_COLUMNS[-3:]))
    return (
        f"INSERT INTO holds ({columns}) VALUES {_marks(len(HOLD_COLUMNS), rows)} "
        f"ON CONFLICT (request_id) DO UPDATE SET {news}"
    )


@lru_cache(maxsize=64)
def _delete_holds(rows: int) -> str:
    return f"DELETE FROM holds WHERE request_id IN ({','.join('?' * rows)})"


@lru_cache(maxsize=64)
def _insert_usage(rows: int) -> str:
    columns = ", ".join(USAGE_COLUMNS)
    marks = _marks(len(USAGE_COLUMNS), rows)
    return f"INSERT INTO usage_records ({columns}) VALUES {marks} ON CONFLICT (request_id) DO NOTHING"


@lru_cache(maxsize=64)
def _end_calls(rows: int) -> str:
    return f"INSERT INTO ended_calls ({', '.join(USAGE_COLUMNS)}) VALUES {_marks(len(USAGE_COLUMNS), rows)}"


@lru_cache(maxsize=64)
def _add_totals(rows: int) -> str:
    columns = ", ".join(TOTAL_COLUMNS)
    sums = ", ".join(f"{name} = daily_totals.{name} + excluded.{name}" for name in TOTAL_COLUMNS[4:])
    return (
        f"INSERT INTO daily_totals ({columns}) VALUES {_marks(len(TOTAL_COLUMNS), rows)} "
        f"ON CONFLICT (day, key_id, organisation, model) DO UPDATE SET {sums}"
    )


def _in_chunks(run: Run, text: Callable[[int], str], rows: Sequence[Sequence[Any]]) -> int:
    """Run `text(n)` over `rows`, at most `_MOST_ROWS` at a time; returns the number of changed rows."""
    changed = 0
    for start in range(0, len(rows), _MOST_ROWS):
        part = rows[start : start + _MOST_ROWS]
        changed += run(text(len(part)), list(chain.from_iterable(part))).rowcount
    return changed


def hold_row(held: Held, expires_at: float, usage: Usage) -> HoldRow:
    """A call under way in the order of `HOLD_COLUMNS`; its lease in Unix seconds."""
    return (
        held.request_id,
        held.key_id,
        held.organisation,
        held.model,
        held.endpoint,
        held.tokens,
        held.day,
        int(held.stream),
        held.started_at,
        expires_at,
        held.trace_id,
        usage.prompt,
        usage.completion,
        usage.cached,
    )


def usage_row(record: UsageRecord) -> tuple[Any, ...]:
    """A record in the order of `USAGE_COLUMNS`, which is the order of its fields."""
    row = msgspec.structs.astuple(record)
    return (*row[:_STREAM], int(record.stream), *row[_STREAM + 1 :])


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
    """What one transaction takes: rows of calls under way by request id, records of ended calls, energy, and the
    request ids whose rows in `holds` are over."""

    holds: dict[str, HoldRow] = field(default_factory=dict)
    records: list[UsageRecord] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    energy: list[EnergyRow] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.holds or self.records or self.ended or self.energy)


def kept_aside(records: list[UsageRecord]) -> Group:
    """The group of records from elsewhere, whose calls may have left a row in `holds`."""
    return Group(records=records, ended=[record.request_id for record in records])


def write(database: Database, group: Group) -> int:
    """One transaction: calls under way, ended calls, energy. Returns the records that were new.

    A call is recorded once: by its request id, its key and the time it began. So a group may be repeated when nobody
    knows whether its commit arrived. Another call with the same request id is recorded under `extended`.
    """
    try:
        return _end(database, group) if database.sqlite else _write(database, group, careful=False)
    except Taken:
        return _write(database, group, careful=True)  # again, looking for that id first


def _end(database: Database, group: Group) -> int:
    """As `_write`, by `schema.ENDED_CALLS`. Raises `Taken` when an id of the group is there already."""
    records = group.records
    alone = not (group.holds or group.energy) and len(records) <= _MOST_ROWS
    with database.group(alone=alone) as run:
        if not alone:
            _in_chunks(run, _put_holds, list(group.holds.values()))
            _in_chunks(run, _add_energy, _energy(group.energy))
        _in_chunks(run, _end_calls, [usage_row(record) for record in records])
    return len(records)


def _write(database: Database, group: Group, *, careful: bool) -> int:
    with database.group() as run:
        if group.holds:
            _in_chunks(run, _put_holds, list(group.holds.values()))
        if group.energy:
            _in_chunks(run, _add_energy, _energy(group.energy))
        if group.ended:
            _in_chunks(run, _delete_holds, [(request_id,) for request_id in group.ended])
        if not group.records:
            return 0
        fresh = _fresh(run, group.records) if careful else group.records
        if _in_chunks(run, _insert_usage, [usage_row(record) for record in fresh]) != len(fresh):
            raise Taken
        _in_chunks(run, _add_totals, totals(fresh))
        return len(fresh)


def extended(record: UsageRecord) -> str:
    """The request id of a call whose own id belongs to another call: always the same one for the same call."""
    call = f"{record.key_id} {record.started_at!r}".encode()
    return f"{record.request_id[:64]}.{hashlib.blake2b(call, digest_size=4).hexdigest()}"


def _known(run: Run, ids: Sequence[str]) -> dict[str, tuple[str, float]]:
    """Key and begin of those calls that the ledger has, by request id."""
    found: dict[str, tuple[str, float]] = {}
    for start in range(0, len(ids), _MOST_ROWS):
        part = ids[start : start + _MOST_ROWS]
        for request_id, key_id, started_at in run(_find(len(part)), part).fetchall():
            found[request_id] = (key_id, started_at)
    return found


@lru_cache(maxsize=64)
def _find(rows: int) -> str:
    marks = ",".join("?" * rows)
    return f"SELECT request_id, key_id, started_at FROM usage_records WHERE request_id IN ({marks})"


def _fresh(run: Run, records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """Those of `records` that the ledger does not have, under the ids that they can have."""
    known = _known(run, [name for record in records for name in (record.request_id, extended(record))])
    fresh: list[UsageRecord] = []
    for record in records:
        call = (record.key_id, record.started_at)
        other = known.get(record.request_id)
        if other == call:
            continue
        if other is not None:
            name = extended(record)
            if name in known:
                continue
            record = msgspec.structs.replace(record, request_id=name)
        known[record.request_id] = call
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
