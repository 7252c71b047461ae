"""A database of an older form is brought to the newest one, and means the same."""

import pytest
from tests.doubles.postgres import postgres

from gateway.keys import digest_of
from gateway.store import Database, migrate, schema, seeding

OLD, NEW, OTHER = "sk-old-0123456789", "sk-new-0123456789", "sk-other-0123456789"


@pytest.fixture(params=["sqlite", "postgresql"])
def old(request, tmp_path, monkeypatch):
    """A database of the first form, its connection open."""

    def first_form(url: str) -> Database:
        database = Database(url)
        database.connect()
        with monkeypatch.context() as older:
            older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
            migrate(database)
        return database

    if request.param == "sqlite":
        database = first_form(f"sqlite:///{tmp_path}/gateway.sqlite3")
        yield database
        database.close()
        return
    with postgres() as server:
        database = first_form(server.database())
        yield database
        database.close()


def fill(database: Database, origin: str, secrets: dict[str, float | None], *actions: str) -> None:
    """One key of `origin` with secrets and when they end, and what the audit says was done to it."""
    database.run(
        "INSERT INTO keys (id, name, priority, weight, disabled, origin, created_at, generation) "
        "VALUES ('key_1', 'team', 'normal', 1, 0, ?, 0, 1)",
        (origin,),
    )
    for secret, end in secrets.items():
        database.run("INSERT INTO key_secrets VALUES (?, 'key_1', 0, ?)", (digest_of(secret), end))
    for action in actions:
        text = "INSERT INTO audit (at, actor, action, subject, details) VALUES (0, 'a', ?, 'key_1', '{}')"
        database.run(text, (action,))
    migrate(database)


def valid(database: Database) -> list[str]:
    found = {bytes(digest) for (digest,) in database.rows("SELECT digest FROM key_secrets WHERE not_after IS NULL")}
    return [secret for secret in (OLD, NEW, OTHER) if digest_of(secret) in found]


def test_what_was_rotated_before_stays_rotated(old):
    fill(old, "environment", {OLD: 5.0, NEW: None}, "key_created", "key_rotated")
    seeding.seed(old, f"team={OLD}")
    assert valid(old) == [NEW]


def test_what_the_variable_did_before_is_its_own(old):
    fill(old, "environment", {OLD: 5.0, NEW: None}, "key_created", "secret_replaced", "secret_revoked")
    seeding.seed(old, f"team={OLD}")
    assert valid(old) == [OLD]


def test_what_a_start_brought_back_before_is_the_variables(old):
    fill(old, "environment", {OLD: None, NEW: 5.0}, "key_created", "key_rotated", "secret_revoked", "secret_restored")
    seeding.seed(old, f"team={OTHER}")
    assert valid(old) == [OTHER]


def test_keys_that_an_operator_made_are_not_touched(old):
    fill(old, "made", {OLD: 5.0, NEW: None}, "key_created", "key_rotated")
    seeding.seed(old, None)
    assert valid(old) == [NEW]
