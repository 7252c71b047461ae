"""A damaged database file: set aside, never written again, and what can be read of it is kept."""

import sqlite3

import pytest
from tests.doubles.records import record
from tests.doubles.stages import SECRET, Stages, settings_for, stages

from gateway.errors import InvalidApiKey
from gateway.keys import digest_of
from gateway.store import Database, StoreUnavailable, batch, migrate, reports, schema, seeding


def fill(path, calls: int) -> None:
    """A database with keys and records, closed."""
    database = Database(f"sqlite:///{path}")
    with database.session():
        migrate(database)
        seeding.seed(database, f"team={SECRET}")
        for start in range(0, calls, 500):
            batch.write(database, batch.Group(records=[record(f"r{start + n}") for n in range(500)]))
        database.run("PRAGMA wal_checkpoint(TRUNCATE)")


async def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(tmp_path):
    path = tmp_path / "gateway.sqlite3"
    fill(path, 2000)
    size = path.stat().st_size
    with path.open("r+b") as file:  # pages in the middle, where the ledger is
        file.seek(size // 2)
        file.write(b"\xde\xad" * 8192)
    damaged = path.read_bytes()
    async with stages(tmp_path) as made:
        assert made.started.damaged is not None
        aside = tmp_path / made.started.damaged
        assert aside.read_bytes() == damaged
        assert made.call().caller.name == "team"  # the keys are there
        assert made.rows("SELECT SUM(requests) FROM daily_totals") == [(2000,)]
        kept = made.rows("SELECT COUNT(*) FROM usage_records")[0][0]
        assert 0 < kept < 2000
        audit = await made.store.read(reports.audit)
        assert audit[0]["action"] == "database_damaged"
        call = made.call()
        await made.budget.hold(call)
        await made.end(call)
    async with stages(tmp_path) as made:
        assert made.started.damaged is None


async def test_a_file_that_is_no_database_is_set_aside(tmp_path):
    path = tmp_path / "gateway.sqlite3"
    path.write_bytes(b"this is not a database" * 1000)
    async with stages(tmp_path) as made:
        assert made.started.damaged is not None
        assert (tmp_path / made.started.damaged).read_bytes().startswith(b"this is not")
        assert made.call().caller.name == "team"


async def test_a_locked_or_healthy_file_is_never_set_aside(tmp_path):
    path = tmp_path / "gateway.sqlite3"
    fill(path, 500)
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    made = Stages(settings_for(tmp_path))
    with pytest.raises(StoreUnavailable):
        await made.start()
    lock.execute("ROLLBACK")
    lock.close()
    async with stages(tmp_path) as again:
        assert again.started.damaged is None
    assert [p.name for p in tmp_path.iterdir() if "damaged" in p.name] == []


async def test_a_damaged_file_of_an_older_form_keeps_its_keys(tmp_path, monkeypatch):
    """Its secrets lack the columns that came later; they open what they opened, and a start brings none back."""
    path = tmp_path / "gateway.sqlite3"
    database = Database(f"sqlite:///{path}")
    with database.session():
        with monkeypatch.context() as older:
            older.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
            migrate(database)
        database.run(
            "INSERT INTO keys (id, name, priority, weight, disabled, origin, created_at, generation) "
            "VALUES ('key_1', 'team', 'normal', 1, 0, 'environment', 0, 1)"
        )
        database.run(
            "INSERT INTO audit (at, actor, action, subject, details) VALUES (0, 'a', 'key_rotated', 'key_1', '{}')"
        )
        for secret, end in ((SECRET, 5.0), ("sk-rotated-0123456789", None)):
            database.run("INSERT INTO key_secrets VALUES (?, 'key_1', 0, ?)", (digest_of(secret), end))
        for start in range(0, 2000, 500):
            batch.write(database, batch.Group(records=[record(f"r{start + n}") for n in range(500)]))
        database.run("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xde\xad" * 8192)
    async with stages(tmp_path) as made:
        assert made.started.damaged is not None
        assert made.call(secret="sk-rotated-0123456789").caller.name == "team"
        with pytest.raises(InvalidApiKey):
            made.call()
