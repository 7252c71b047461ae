"""Reading usage: totals by day, by key, organisation or model."""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

from typing import Any

import msgspec

from gateway.store.connection import Database

GROUPS = {"key": "key_id", "organisation": "organisation", "model": "model", "day": "day"}
SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "requests", "refusals")
_MEASURED = ("key", "day")


def usage(database: Database, first: str | None, last: str | None, group: str) -> list[dict[str, Any]]:
    """Totals from day `first` to day `last` (ISO dates, both included, None = open), one row a member of `group`.

    `energy_joules` (by key and by day) is None where nothing was measured.
    """
    column = GROUPS[group]
    where, parameters = [], []
    for day, sign in ((first, ">="), (last, "<=")):
        if day is not None:
            where.append(f"t.day {sign} ?")
            parameters.append(day)
    named = group == "key"
    text = (
        f"SELECT t.{column}, {'MAX(k.name)' if named else 'NULL'}, "
        + ", ".join(f"SUM(t.{name})" for name in SUMS)
        + " FROM daily_totals t "
        + ("LEFT JOIN keys k ON k.id = t.key_id " if named else "")
        + (f"WHERE {' AND '.join(where)} " if where else "")
        + f"GROUP BY t.{column} ORDER BY t.{column}"
    )
    joules = _joules(database, column, " AND ".join(where), parameters) if group in _MEASURED else None
    head = columns(group)
    found = []
    for name, label, *sums in database.rows(text, parameters):
        measured = [joules.get(name)] if joules is not None else []
        found.append(dict(zip(head, [name, *([label] if named else []), *measured, *map(int, sums)], strict=True)))
    return found


def columns(group: str) -> list[str]:
    """What each row of `usage` has, in its order."""
    name = [GROUPS[group], "name"] if group == "key" else [GROUPS[group]]
    return [*name, *(["energy_joules"] if group in _MEASURED else []), *SUMS]


def _joules(database: Database, column: str, where: str, parameters: list[Any]) -> dict[str, float]:
    text = (
        f"SELECT t.{column}, SUM(t.joules) FROM daily_energy t {f'WHERE {where}' if where else ''} GROUP BY t.{column}"
    )
    return {name: float(joules) for name, joules in database.rows(text, parameters)}


def energy(database: Database, key_id: str, day: str) -> float | None:
    """Joules of a key on one day; None when nothing was ever measured."""
    rows = database.rows("SELECT joules FROM daily_energy WHERE key_id = ? AND day = ?", (key_id, day))
    return float(rows[0][0]) if rows else None


def audit(database: Database, most: int = 1000) -> list[dict[str, Any]]:
    """The newest audit rows, newest first."""
    return [
        {"at": at, "actor": actor, "action": action, "subject": subject, "details": msgspec.json.decode(details)}
        for at, actor, action, subject, details in database.rows(
            "SELECT at, actor, action, subject, details FROM audit ORDER BY id DESC LIMIT ?", (most,)
        )
    ]


def day_totals(database: Database, day: str) -> list[tuple[str, str, int, int]]:
    """`(key id, organisation or "", tokens, requests)` of one day."""
    return [
        (key_id, organisation, int(tokens), int(requests))
        for key_id, organisation, tokens, requests in database.rows(
            "SELECT key_id, organisation, SUM(prompt_tokens + completion_tokens), SUM(requests) FROM daily_totals "
            "WHERE day = ? GROUP BY key_id, organisation",
            (day,),
        )
    ]


def used(database: Database, day: str, column: str, name: str) -> tuple[int, int]:
    """`(tokens, requests)` recorded on one day for `name` of `column` (key_id or organisation)."""
    rows = database.rows(
        "SELECT SUM(prompt_tokens + completion_tokens), SUM(requests) FROM daily_totals "
        f"WHERE day = ? AND {column} = ?",
        (day, name),
    )
    tokens, requests = rows[0]
    return int(tokens or 0), int(requests or 0)


def last_days(database: Database, most: int = 3) -> list[str]:
    """The latest days that have totals, ISO dates, the latest first."""
    found = database.rows("SELECT DISTINCT day FROM daily_totals ORDER BY day DESC LIMIT ?", (most,))
    return [day for (day,) in found]
