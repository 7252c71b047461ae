"""Keys and organisations in the database: reading and changing. Every change leaves an audit row.

Each change takes the next `generation` and stamps the keys that it touches with it, in one transaction; a running
gateway sees the number move and loads what is newer than what it has. Deleted keys stay as rows (usage hangs on their
id) without a valid secret.
"""

# ruff: noqa: S608 - only names of our own schema are put into statements; values are always parameters

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.keys import LIMIT_NAMES, Key, KeyNotFound, Secret, digest_of, label, new_key_id, new_secret
from gateway.store.connection import Database

Changes = list[tuple[Key, list[Secret]]]
OPERATOR, ENVIRONMENT = "operator", "environment"  # who made a secret, and who ended it
_KEY_COLUMNS = ("name", "organisation", "models", "priority", "weight", "expires_at", "disabled")
_SELECT = (
    "SELECT k.id, k.name, k.organisation, k.models, k.priority, k.weight, k.expires_at, k.disabled, k.created_at, "
    "k.deleted_at, k.generation, k.origin, o.daily_tokens, "
    + ", ".join(f"l.{name}" for name in LIMIT_NAMES)
    + " FROM keys k LEFT JOIN limits l ON l.key_id = k.id LEFT JOIN organisations o ON o.name = k.organisation "
)


def _key(row: Sequence[Any]) -> Key:
    return Key(
        id=row[0],
        name=row[1],
        organisation=row[2],
        models=None if row[3] is None else msgspec.json.decode(row[3], type=list[str]),
        priority=row[4],
        weight=row[5],
        expires_at=row[6],
        disabled=bool(row[7]),
        created_at=row[8],
        deleted_at=row[9],
        generation=row[10],
        origin=row[11],
        organisation_daily_tokens=row[12],
        limits=dict(zip(LIMIT_NAMES, row[13:], strict=True)),
    )


# Reading


def generation(database: Database) -> int:
    """The number of the last change."""
    return int(database.rows("SELECT value FROM meta WHERE name = 'generation'")[0][0])


def changes_since(database: Database, number: int) -> Changes:
    """Every key that changed after `number`, deleted ones included, with all its secrets."""
    keys = [_key(row) for row in database.rows(_SELECT + "WHERE k.generation > ?", (number,))]
    secrets: dict[str, list[Secret]] = {}
    for digest, key_id, not_before, not_after in database.rows(
        "SELECT s.digest, s.key_id, s.not_before, s.not_after FROM key_secrets s JOIN keys k ON k.id = s.key_id "
        "WHERE k.generation > ?",
        (number,),
    ):
        secrets.setdefault(key_id, []).append(Secret(bytes(digest), key_id, not_before, not_after))
    return [(key, secrets.get(key.id, [])) for key in keys]


def keys(database: Database) -> list[Key]:
    """All keys that were not deleted, oldest first."""
    return [_key(row) for row in database.rows(_SELECT + "WHERE k.deleted_at IS NULL ORDER BY k.created_at, k.id")]


def key(database: Database, key_id: str) -> Key:
    """One key. Raises `KeyNotFound`, also for a deleted one. Every id from outside comes here first."""
    found = []
    if key_id.isascii() and key_id.isprintable():  # PostgreSQL refuses a NUL as if the database were broken
        found = database.rows(_SELECT + "WHERE k.deleted_at IS NULL AND k.id = ?", (key_id,))
    if not found:
        raise KeyNotFound("No key has this id.")
    return _key(found[0])


def organisations(database: Database) -> list[dict[str, Any]]:
    """All organisations with their quota and the number of their keys."""
    return [
        {"name": name, "daily_tokens": daily, "keys": count}
        for name, daily, count in database.rows(
            "SELECT o.name, o.daily_tokens, (SELECT COUNT(*) FROM keys k WHERE k.organisation = o.name AND "
            "k.deleted_at IS NULL) FROM organisations o ORDER BY o.name"
        )
    ]


# Changing


def _next(database: Database) -> int:
    database.run("UPDATE meta SET value = value + 1 WHERE name = 'generation'")
    return generation(database)


def audit(database: Database, actor: str, action: str, subject: str, details: dict[str, Any]) -> None:
    """Who did what to whom, for `reports.audit`."""
    database.run(
        "INSERT INTO audit (at, actor, action, subject, details) VALUES (?, ?, ?, ?, ?)",
        (time.time(), actor, action, subject, msgspec.json.encode(details).decode()),
    )


def touch(database: Database, key_id: str) -> None:
    """Let a running gateway see that a key has changed."""
    database.run("UPDATE keys SET generation = ? WHERE id = ?", (_next(database), key_id))


def _ensure_organisation(database: Database, name: str | None) -> None:
    if name is not None:
        database.run(
            "INSERT INTO organisations (name, daily_tokens, created_at) VALUES (?, NULL, ?) "
            "ON CONFLICT (name) DO NOTHING",
            (name, time.time()),
        )


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    row = {name: values[name] for name in _KEY_COLUMNS if name in values}
    if row.get("models") is not None:
        row["models"] = msgspec.json.encode(row["models"]).decode()
    if "disabled" in row:
        row["disabled"] = int(row["disabled"])
    return row


def insert(database: Database, values: dict[str, Any], origin: str) -> str:
    """A new key without a secret; returns its id."""
    key_id = new_key_id()
    _ensure_organisation(database, values.get("organisation"))
    row = {
        "id": key_id,
        "organisation": None,
        "models": None,
        "priority": "normal",
        "weight": 1,
        "expires_at": None,
        "disabled": 0,
        "origin": origin,
        "created_at": time.time(),
        "generation": _next(database),
        **_columns(values),
    }
    marks = ", ".join("?" * len(row))
    database.run(f"INSERT INTO keys ({', '.join(row)}) VALUES ({marks})", list(row.values()))
    database.run(
        f"INSERT INTO limits (key_id, {', '.join(LIMIT_NAMES)}) VALUES (?, ?, ?, ?, ?, ?)",
        [key_id, *(values.get(name) for name in LIMIT_NAMES)],
    )
    return key_id


def add_secret(database: Database, key_id: str, secret: str, made_by: str) -> None:
    """One more secret, valid from the beginning of time: a clock that is set back must not lock a key out."""
    database.run(
        "INSERT INTO key_secrets (digest, key_id, not_before, not_after, made_by) VALUES (?, ?, 0, NULL, ?)",
        (digest_of(secret), key_id, made_by),
    )


def _end_secrets(database: Database, key_id: str, end: float) -> None:
    """All secrets of a key end at `end`, or have ended; no start brings one back, whatever the variable says."""
    database.run(
        "UPDATE key_secrets SET not_after = CASE WHEN not_after <= ? THEN not_after ELSE ? END, ended_by = ? "
        "WHERE key_id = ?",
        (end, end, OPERATOR, key_id),
    )


def create(database: Database, values: dict[str, Any], actor: str) -> tuple[Key, str]:
    """A new key with one secret; the secret is returned and never again. `values`: `KeyFields.changes()`."""
    secret = new_secret()
    with database.transaction():
        key_id = insert(database, values, "made")
        add_secret(database, key_id, secret, OPERATOR)
        audit(database, actor, "key_created", key_id, values)
        return key(database, key_id), secret


def change(database: Database, key_id: str, values: dict[str, Any], actor: str, action: str = "key_changed") -> Key:
    """Set the given fields of a key; usage is never touched. Raises `KeyNotFound`."""
    with database.transaction():
        key(database, key_id)
        if "organisation" in values:
            _ensure_organisation(database, values["organisation"])
        for table, column, row in (
            ("keys", "id", _columns(values)),
            ("limits", "key_id", {name: values[name] for name in LIMIT_NAMES if name in values}),
        ):
            if row:
                sets = ", ".join(f"{name} = ?" for name in row)
                database.run(f"UPDATE {table} SET {sets} WHERE {column} = ?", [*row.values(), key_id])
        touch(database, key_id)
        audit(database, actor, action, key_id, values)
        return key(database, key_id)


def set_disabled(database: Database, key_id: str, disabled: bool, actor: str) -> Key:
    """Switch a key off or on."""
    action = "key_disabled" if disabled else "key_enabled"
    return change(database, key_id, {"disabled": disabled}, actor, action)


def rotate(database: Database, key_id: str, grace_seconds: float, actor: str) -> str:
    """A new secret; the old ones stay valid for `grace_seconds`, 0 revokes them at once. Raises `KeyNotFound`."""
    secret = new_secret()
    now = time.time()
    with database.transaction():
        key(database, key_id)
        _end_secrets(database, key_id, now + grace_seconds)
        add_secret(database, key_id, secret, OPERATOR)
        touch(database, key_id)
        audit(database, actor, "key_rotated", key_id, {"grace_seconds": grace_seconds})
    return secret


def delete(database: Database, key_id: str, actor: str) -> None:
    """Revoke a key for ever; its usage stays. Raises `KeyNotFound`."""
    now = time.time()
    with database.transaction():
        key(database, key_id)
        database.run("UPDATE keys SET deleted_at = ? WHERE id = ?", (now, key_id))
        _end_secrets(database, key_id, now)
        touch(database, key_id)
        audit(database, actor, "key_deleted", key_id, {})


def set_organisation(database: Database, name: str, daily_tokens: int | None, actor: str) -> dict[str, Any]:
    """Give an organisation a daily quota over all its keys; None or 0 takes it away. Creates it if it is new.

    Raises `InvalidRequest` for a name that no key can have.
    """
    name = label("organisation", name)
    with database.transaction():
        _ensure_organisation(database, name)
        database.run("UPDATE organisations SET daily_tokens = ? WHERE name = ?", (daily_tokens, name))
        database.run("UPDATE keys SET generation = ? WHERE organisation = ?", (_next(database), name))
        audit(database, actor, "organisation_changed", name, {"daily_tokens": daily_tokens})
        return next(o for o in organisations(database) if o["name"] == name)
