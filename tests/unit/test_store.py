"""The database itself: forms, owners, damage, keys that come and go, days that pass."""

import asyncio
import os
import sqlite3
import time
import traceback

import pytest
from tests.doubles.records import record
from tests.doubles.stages import SECRET, Stages, settings_for, stages
from tests.doubles.waiting import until

from gateway.call import Usage
from gateway.errors import InvalidApiKey
from gateway.journal import Held
from gateway.keys import KeyNotFound, digest_of
from gateway.store import (
    Database,
    Store,
    StoreLocked,
    StoreNewer,
    StoreUnavailable,
    accounts,
    batch,
    migrate,
    reports,
    seeding,
)
from gateway.store.schema import MIGRATIONS, TABLES, USAGE_COLUMNS


@pytest.fixture
def database(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/gateway.sqlite3")
    with database.session():
        migrate(database)
        yield database


def test_migrations_run_once_and_make_every_table(database):
    assert migrate(database) == 0
    found = {name for (name,) in database.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert found >= {*TABLES, "migrations"}
    assert [name for (name,) in database.rows("SELECT number FROM migrations")] == list(range(1, len(MIGRATIONS) + 1))
    columns = [row[1] for row in database.rows("PRAGMA table_info(usage_records)")]
    assert columns == ["id", *USAGE_COLUMNS]


def test_a_database_of_a_newer_gateway_is_left_alone(database):
    database.run("INSERT INTO migrations (number) VALUES (?)", (len(MIGRATIONS) + 7,))
    with pytest.raises(StoreNewer, match="newer"):
        migrate(database)


def test_a_failed_transaction_changes_nothing(database):
    def half() -> None:
        with database.transaction():
            database.run("INSERT INTO organisations (name, created_at) VALUES ('x', 0)")
            database.run("INSERT INTO no_such_table VALUES (1)")

    with pytest.raises(StoreUnavailable):
        half()
    assert database.rows("SELECT * FROM organisations") == []


def test_commits_reach_the_disk(database):
    assert database.rows("PRAGMA journal_mode") == [("wal",)]
    assert database.rows("PRAGMA synchronous") == [(2,)]
    database.durable(False)
    assert database.rows("PRAGMA synchronous") == [(1,)]


@pytest.mark.parametrize("count", [1, 3, 64, 65, 149, 512])
def test_groups_of_every_size_are_written_whole(database, count):
    records = [record(f"r{number}", key_id=f"key_{number % 3}") for number in range(count)]
    assert batch.write(database, batch.Group(records=records)) == count
    assert batch.write(database, batch.Group(records=[*records, record("new")])) == 1
    assert database.rows("SELECT COUNT(*), SUM(prompt_tokens) FROM usage_records") == [(count + 1, count + 1)]
    assert database.rows("SELECT SUM(prompt_tokens), SUM(requests) FROM daily_totals") == [(count + 1, count + 1)]


def test_totals_equal_the_records(database):
    records = [
        record(f"r{n}", day=f"2026-01-0{n % 3 + 1}", model="ab"[n % 2], outcome=("ok", "refused", "failed")[n % 3])
        for n in range(100)
    ]
    batch.write(database, batch.Group(records=[*records[:60], *records[40:]]))
    sums = "SUM(prompt_tokens), SUM(completion_tokens), {} FROM {} GROUP BY day, model ORDER BY day, model"
    counted = database.rows("SELECT day, model, " + sums.format("SUM(outcome != 'refused')", "usage_records"))
    assert counted == database.rows("SELECT day, model, " + sums.format("SUM(requests)", "daily_totals"))


async def test_a_second_gateway_is_turned_away_and_the_first_goes_on(tmp_path):
    async with stages(tmp_path) as made:
        second = Stages(settings_for(tmp_path))
        with pytest.raises(StoreLocked):
            await second.start()
        call = made.call()
        await made.budget.hold(call)
        await made.end(call)
    async with stages(tmp_path):
        pass  # given up at the end, so the next one may


async def test_a_folder_that_is_missing_is_told(tmp_path):
    with pytest.raises(StoreUnavailable, match="does not exist"):
        await Stages(settings_for(tmp_path, DATABASE_URL=f"sqlite:///{tmp_path}/none/g.sqlite3")).start()


def test_a_database_is_opened_on_a_disk_with_room_only(tmp_path, monkeypatch):
    """Whoever opens it first makes the file that SQLite maps; without room for it that may kill the process."""
    place = os.statvfs(tmp_path)
    full = os.statvfs_result([0 if name in (3, 4) else value for name, value in enumerate(place)])
    database = Database(f"sqlite:///{tmp_path}/some.sqlite3")
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(StoreUnavailable, match="is full"):
        database.connect()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "statvfs", lambda _: place)
    database.connect()
    database.run("CREATE TABLE some (value INTEGER)")
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    another = Database(f"sqlite:///{tmp_path}/some.sqlite3")
    another.connect()  # what it needs is there
    assert another.rows("SELECT * FROM some") == []
    another.close()
    database.close()


async def test_a_change_by_another_process_is_noticed_at_once(tmp_path):
    async with stages(tmp_path) as made:
        other = Database(made.settings.database_url)

        def change():
            with other.session():
                return accounts.create(other, {"name": "cli"}, "test")

        key, secret = await asyncio.to_thread(change)
        await until("the new key is noticed", lambda: made.keyring.find(digest_of(secret)) is not None)
        assert made.call(secret=secret).caller.key_id == key.id


async def test_a_change_through_the_store_holds_when_it_returns(tmp_path):
    async with stages(tmp_path) as made:
        key, secret = await made.store.change(lambda db: accounts.create(db, {"name": "new"}, "test"))
        assert made.call(secret=secret).caller.name == "new"
        await made.store.change(lambda db: accounts.delete(db, key.id, "test"))
        with pytest.raises(InvalidApiKey):
            made.call(secret=secret)


async def test_rotation_with_and_without_grace(tmp_path):
    async with stages(tmp_path) as made:
        key, old = await made.store.change(lambda db: accounts.create(db, {"name": "new"}, "test"))
        new = await made.store.change(lambda db: accounts.rotate(db, key.id, 3600, "test"))
        assert made.call(secret=old).caller == made.call(secret=new).caller
        newest = await made.store.change(lambda db: accounts.rotate(db, key.id, 0, "test"))
        for gone in (old, new):
            with pytest.raises(InvalidApiKey):
                made.call(secret=gone)
        assert made.call(secret=newest).caller.key_id == key.id


async def test_every_change_leaves_an_audit_row_and_no_secret_stays_readable(tmp_path):
    async with stages(tmp_path) as made:
        key, first = await made.store.change(lambda db: accounts.create(db, {"name": "n", "daily_tokens": 5}, "ann"))
        second = await made.store.change(lambda db: accounts.rotate(db, key.id, 0, "ann"))
        for work in (
            lambda db: accounts.change(db, key.id, {"weight": 2}, "ann"),
            lambda db: accounts.set_disabled(db, key.id, True, "ann"),
            lambda db: accounts.set_disabled(db, key.id, False, "ann"),
            lambda db: accounts.set_organisation(db, "lab", 10, "ann"),
            lambda db: accounts.delete(db, key.id, "ann"),
        ):
            await made.store.change(work)
        rows = await made.store.read(reports.audit)
        assert [row["action"] for row in reversed(rows)] == [
            "key_created", "key_created", "key_rotated", "key_changed", "key_disabled", "key_enabled",
            "organisation_changed", "key_deleted",
        ]  # fmt: skip
        assert {row["actor"] for row in rows} == {"environment", "ann"}
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (first, second, SECRET):
        assert secret.encode() not in content


def test_unknown_keys_are_not_found(database):
    for work in (
        lambda: accounts.key(database, "key_x"),
        lambda: accounts.change(database, "key_x", {"weight": 1}, "test"),
        lambda: accounts.rotate(database, "key_x", 0, "test"),
        lambda: accounts.delete(database, "key_x", "test"),
    ):
        with pytest.raises(KeyNotFound):
            work()
    assert accounts.generation(database) == 0


class TestSeeding:
    """GATEWAY_API_KEYS."""

    def valid(self, database) -> dict[str, str]:
        """Valid secrets' key names by secret."""
        secrets = ("alpha-secret", "beta-secret", "gamma-secret")
        found = {}
        for secret in secrets:
            rows = database.rows(
                "SELECT k.name FROM key_secrets s JOIN keys k ON k.id = s.key_id WHERE s.digest = ? AND "
                "s.not_after IS NULL AND k.deleted_at IS NULL",
                (digest_of(secret),),
            )
            if rows:
                found[secret] = rows[0][0]
        return found

    def test_they_exist_and_only_once(self, database):
        seeding.seed(database, "a=alpha-secret, beta-secret ,,")
        assert self.valid(database) == {"alpha-secret": "a", "beta-secret": "environment-2"}
        ids = [key.id for key in accounts.keys(database)]
        generation = accounts.generation(database)
        seeding.seed(database, "beta-secret,a=alpha-secret")
        assert [key.id for key in accounts.keys(database)] == ids
        assert accounts.generation(database) == generation

    def test_what_left_the_variable_is_revoked_and_may_come_back(self, database):
        seeding.seed(database, "a=alpha-secret,b=beta-secret")
        seeding.seed(database, "a=alpha-secret")
        assert self.valid(database) == {"alpha-secret": "a"}
        seeding.seed(database, None)
        assert self.valid(database) == {}
        seeding.seed(database, "a=alpha-secret,b=beta-secret")
        assert self.valid(database) == {"alpha-secret": "a", "beta-secret": "b"}
        assert len(accounts.keys(database)) == 2

    def test_a_new_secret_of_a_named_key_keeps_its_id(self, database):
        seeding.seed(database, "a=alpha-secret")
        before = accounts.keys(database)[0].id
        seeding.seed(database, "a=gamma-secret")
        assert self.valid(database) == {"gamma-secret": "a"}
        assert [key.id for key in accounts.keys(database)] == [before]

    def test_what_an_operator_decided_stays(self, database):
        seeding.seed(database, "a=alpha-secret,b=beta-secret")
        a, b = accounts.keys(database)
        accounts.set_disabled(database, a.id, True, "test")
        accounts.delete(database, b.id, "test")
        done = seeding.seed(database, "a=alpha-secret,b=beta-secret")
        assert done["deleted"] == 1
        assert [(key.name, key.disabled) for key in accounts.keys(database)] == [("a", True)]
        assert self.valid(database) == {"alpha-secret": "a"}

    def test_a_key_made_by_an_operator_is_not_touched(self, database):
        key, _ = accounts.create(database, {"name": "made"}, "test")
        seeding.seed(database, "a=alpha-secret")
        seeding.seed(database, None)
        assert [(k.id, k.disabled) for k in accounts.keys(database) if k.name == "made"] == [(key.id, False)]


async def test_retention_runs_by_itself(tmp_path):
    async with stages(tmp_path, USAGE_RETENTION_DAYS=1) as made:
        old = time.time() - 2 * 86_400
        for number in range(3):
            await made.store.settle(record(f"r{number}", started_at=old))
        made.store._next_sweep = 0.0
        await until("old records go", lambda: made.rows("SELECT COUNT(*) FROM usage_records") == [(0,)])


async def test_energy_adds_up(tmp_path):
    async with stages(tmp_path) as made:
        made.store.add_energy([("2026-01-01", "key_1", 1.5), ("2026-01-01", "key_1", 2.0)])
        made.store.add_energy([("2026-01-01", "key_1", 0.25), ("2026-01-02", "key_2", 9.0)])
        await made.store.settle(record("r1"))
        assert made.rows("SELECT * FROM daily_energy ORDER BY day") == [
            ("2026-01-01", "key_1", 3.75), ("2026-01-02", "key_2", 9.0)
        ]  # fmt: skip


def test_the_store_needs_no_loop_to_be_made(tmp_path):
    assert not Store(settings_for(tmp_path), lambda changes, whole: None).healthy


def test_rows_of_calls_under_way_are_renewed_and_end_with_their_record(database):
    held = Held("r1", "k", None, "m", "e", 9, "2026-01-01", False, 5.0, None)
    batch.write(database, batch.Group(holds={"r1": batch.hold_row(held, 100.0, Usage())}))
    batch.write(database, batch.Group(holds={"r1": batch.hold_row(held, 200.0, Usage(3, 4, 1))}))
    assert database.rows("SELECT expires_at, prompt_tokens, completion_tokens, cached_tokens FROM holds") == [
        (200.0, 3, 4, 1)
    ]
    batch.write(database, batch.Group(records=[record("r1")], ended=["r1"]))
    assert database.rows("SELECT COUNT(*) FROM holds") == [(0,)]


def test_one_request_id_for_several_calls_is_extended_and_each_call_recorded_once(database):
    calls = [record("same", started_at=float(n), key_id=f"key_{n % 2}") for n in range(4)]
    assert batch.write(database, batch.Group(records=calls[:1])) == 1
    assert batch.write(database, batch.Group(records=calls)) == 3
    assert batch.write(database, batch.Group(records=calls)) == 0  # also under the ids that they were given
    assert batch.write(database, batch.Group(records=[calls[3]])) == 0
    rows = database.rows("SELECT request_id, started_at FROM usage_records ORDER BY started_at")
    assert [row[1] for row in rows] == [0.0, 1.0, 2.0, 3.0]
    assert rows[0][0] == "same"
    assert all(row[0] == batch.extended(call) for row, call in zip(rows[1:], calls[1:], strict=True))
    assert database.rows("SELECT SUM(requests) FROM daily_totals") == [(4,)]


@pytest.mark.parametrize(
    "url", ["postgresql://ann:p%40ss-word-1@127.0.0.1:1/x", "postgresql://ann:p%40ss-word-1@[::1/x",
            "postgresql://ann:p%40ss-word-1@127.0.0.1:port/x"]
)  # fmt: skip
def test_a_database_password_is_in_no_error(url):
    with pytest.raises(StoreUnavailable) as failure:
        Database(url).connect()
    told = "".join(traceback.format_exception(failure.value))
    assert "p%40ss-word-1" not in told
    assert "p@ss-word-1" not in told


async def test_a_change_does_not_wait_behind_the_calls(tmp_path):
    """Under as many commits as the disk takes, an operator's change holds as soon as the calls' do that came with it."""
    async with stages(tmp_path) as made:
        over, ended = False, 0

        async def client() -> None:
            nonlocal ended
            while not over:
                call = made.call()
                await made.budget.hold(call)
                await made.end(call)
                ended += 1

        clients = [asyncio.create_task(client()) for _ in range(64)]
        await until("all are busy", lambda: ended > 640)
        overtaken = []
        for number in range(10):
            before = ended
            values = {"name": f"n{number}"}
            _, secret = await made.store.change(lambda db, values=values: accounts.create(db, values, "test"))
            assert made.call(secret=secret).caller.name == f"n{number}"
            overtaken.append(ended - before)
        with pytest.raises(KeyNotFound):
            await made.store.change(lambda db: accounts.delete(db, "key_x", "test"))
        over = True
        await asyncio.gather(*clients)
        assert made.ledger.healthy
        # Calls that came after it and ended before it: a commit or two of them, not as many as there will ever be.
        assert sorted(overtaken)[5] <= 4 * 64, overtaken


async def test_while_nothing_can_be_kept_refusals_do_not_fill_the_memory(tmp_path):
    """On a full disk callers may ask again for hours; what was answered is booked all the same."""
    async with stages(tmp_path) as made:
        (tmp_path / "usage.spool").mkdir()  # the spool cannot be written
        locker = sqlite3.connect(tmp_path / "gateway.sqlite3", isolation_level=None)
        locker.execute("BEGIN EXCLUSIVE")
        try:
            answered = [record(f"answered{number}", outcome="failed") for number in range(20)]
            refused = [record(f"refused{number}", outcome="refused", completion_tokens=0) for number in range(4_000)]
            for some in (answered, refused):
                told = await asyncio.gather(*map(made.store.settle, some), return_exceptions=True)
                assert {type(one) for one in told} == {StoreUnavailable}
            assert 20 <= made.store.aside <= 1_000 + 512
        finally:
            locker.execute("ROLLBACK")
            locker.close()
            (tmp_path / "usage.spool").rmdir()
        await until("it heals", lambda: made.ledger.healthy)
        assert made.rows("SELECT COUNT(*) FROM usage_records WHERE outcome = 'failed'") == [(20,)]


async def test_an_answer_that_could_not_be_recorded_in_time_is_not_booked_as_whole(tmp_path):
    async with stages(tmp_path) as made:
        (tmp_path / "usage.spool").mkdir()  # the spool cannot be written
        locker = sqlite3.connect(tmp_path / "gateway.sqlite3", isolation_level=None)
        locker.execute("BEGIN EXCLUSIVE")
        try:
            with pytest.raises(StoreUnavailable):
                await made.store.settle(record("r1", outcome="ok"))
        finally:
            locker.execute("ROLLBACK")
            locker.close()
            (tmp_path / "usage.spool").rmdir()
        await until("the record is written", lambda: made.rows("SELECT outcome, code, status FROM usage_records"))
        assert made.rows("SELECT outcome, code, status FROM usage_records") == [("failed", "ledger_unavailable", 503)]
