"""The keys of `GATEWAY_API_KEYS`: what a start makes and ends.

It touches only secrets that the variable itself made, or ended by losing them. What an operator made or ended in a
rotation stays as it is: a start that undid it would let a leaked secret in again and lock the new one out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from loguru import logger

from gateway.keys import digest_of
from gateway.settings import split_keys
from gateway.store.accounts import ENVIRONMENT, add_secret, audit, insert, touch
from gateway.store.connection import Database


@dataclass(slots=True)
class _Known:
    """A secret of a key that the variable once made."""

    key_id: str
    name: str
    deleted: bool
    ended: bool
    made_by: str
    ended_by: str | None


def seed(database: Database, configured: str | None) -> dict[str, int]:
    """Make the keys of the variable (`name=secret` or `secret`, comma-separated) exist, and only those.

    A secret that left the variable is revoked; a changed secret of a named key replaces the old one; a key that an
    operator disabled or deleted, and a secret that one rotated away, stay so. Returns how many were created, revoked,
    kept, left deleted and left rotated.
    """
    wanted = {digest_of(secret): (name, secret) for name, secret in split_keys(configured or "")}
    done = {"created": 0, "revoked": 0, "kept": 0, "deleted": 0, "rotated": 0}
    with database.transaction():
        known = _known(database)
        for digest, one in known.items():
            if digest not in wanted and not one.deleted and not one.ended and one.made_by == ENVIRONMENT:
                _end(database, digest, one)
                done["revoked"] += 1
        by_name = {one.name: one.key_id for one in known.values() if not one.deleted}
        for number, (digest, (label, secret)) in enumerate(wanted.items(), start=1):
            if digest in known:
                done[_again(database, digest, known[digest])] += 1
                continue
            if database.rows("SELECT 1 FROM key_secrets WHERE digest = ?", (digest,)):
                continue  # a key that an operator made; the variable repeats it
            if label is not None and label in by_name:
                key_id = by_name[label]
                touch(database, key_id)
                audit(database, ENVIRONMENT, "secret_replaced", key_id, {})
            else:
                key_id = insert(database, {"name": label or f"environment-{number}"}, ENVIRONMENT)
                audit(database, ENVIRONMENT, "key_created", key_id, {"name": label})
                done["created"] += 1
            add_secret(database, key_id, secret, ENVIRONMENT)
    return done


def _known(database: Database) -> dict[bytes, _Known]:
    return {
        bytes(digest): _Known(key_id, name, deleted_at is not None, not_after is not None, made_by, ended_by)
        for digest, key_id, name, deleted_at, not_after, made_by, ended_by in database.rows(
            "SELECT s.digest, s.key_id, k.name, k.deleted_at, s.not_after, s.made_by, s.ended_by FROM key_secrets s "
            "JOIN keys k ON k.id = s.key_id WHERE k.origin = 'environment'"
        )
    }


def _end(database: Database, digest: bytes, one: _Known) -> None:
    database.run(
        "UPDATE key_secrets SET not_after = ?, ended_by = ? WHERE digest = ?", (time.time(), ENVIRONMENT, digest)
    )
    touch(database, one.key_id)
    audit(database, ENVIRONMENT, "secret_revoked", one.key_id, {})


def _again(database: Database, digest: bytes, one: _Known) -> str:
    """The variable has a secret that is known already; returns what became of it."""
    if one.deleted:
        return "deleted"
    if one.ended and one.ended_by != ENVIRONMENT:
        logger.warning("seeded_secret_rotated", key_id=one.key_id, name=one.name)
        return "rotated"
    if one.ended or one.made_by != ENVIRONMENT:
        # Also what a rotation made and somebody then put into the variable: from now on it goes with the variable.
        text = "UPDATE key_secrets SET not_after = NULL, made_by = ?, ended_by = NULL WHERE digest = ?"
        database.run(text, (ENVIRONMENT, digest))
    if one.ended:
        touch(database, one.key_id)
        audit(database, ENVIRONMENT, "secret_restored", one.key_id, {})
    return "kept"
