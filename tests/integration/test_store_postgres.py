"""The same truth on PostgreSQL: a real server, the same promises as on SQLite."""

import asyncio

import pytest
from tests.doubles.postgres import postgres, programs
from tests.doubles.stages import SECRET, Stages, settings_for, stages
from tests.doubles.waiting import until

from gateway.call import Outcome, Usage
from gateway.errors import LedgerUnavailable, QuotaExhausted
from gateway.keys import digest_of
from gateway.store import Database, StoreLocked, StoreUnavailable, accounts, batch, migrate, reports
from gateway.store.schema import MIGRATIONS, TABLES

pytestmark = pytest.mark.skipif(
    programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"
)


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


@pytest.fixture
def url(server):
    return server.database()


def test_migrations_once_also_when_two_start_together(url):
    from concurrent.futures import ThreadPoolExecutor

    database = Database(url)

    def start() -> int:
        with database.session():
            return migrate(database)

    with ThreadPoolExecutor(4) as pool:
        ran = sorted(pool.submit(start).result() for _ in range(4))
    assert ran == [0, 0, 0, len(MIGRATIONS)]
    with database.session():
        found = {name for (name,) in database.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
        assert found >= set(TABLES)


async def test_a_call_from_hold_to_record(tmp_path, url):
    async with stages(tmp_path, DATABASE_URL=url, DEFAULT_DAILY_TOKENS=1000) as made:
        call = made.call()
        await made.budget.hold(call)
        await until("a row", lambda: made.rows("SELECT request_id, tokens FROM holds") == [(call.request_id, 150)])
        call.usage = Usage(7, 3, 0, known=True)
        await until("usage noted", lambda: made.rows("SELECT prompt_tokens, completion_tokens FROM holds") == [(7, 3)])
        await made.end(call)
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        assert made.rows("SELECT prompt_tokens, completion_tokens, outcome FROM usage_records") == [(10, 20, "ok")]
        again = made.call(request_id=call.request_id)
        assert await made.budget.hold(again) is False
    async with stages(tmp_path, DATABASE_URL=url, DEFAULT_DAILY_TOKENS=1000) as made:
        day = made.budget.account(made.call().caller.key_id).day(made.budget.days.today())
        assert (day.used, day.requests) == (30, 1)


async def test_200_clients_share_a_quota(tmp_path, url):
    quota = 10_000
    async with stages(tmp_path, DATABASE_URL=url, DEFAULT_DAILY_TOKENS=quota, QUEUE_CALLS=500) as made:

        async def client(number: int) -> None:
            while True:
                call = made.call(prompt=60, output=40 + number % 50)
                try:
                    await made.budget.hold(call)
                except QuotaExhausted:
                    call.outcome = Outcome.REFUSED
                    return made.close(call)
                await made.end(call, 30 + number % 31, call.request.output_limit or call.request.max_output)

        await asyncio.gather(*(client(number) for number in range(200)))
        await made.store.change(lambda db: None)
        settled = int(made.rows("SELECT SUM(prompt_tokens + completion_tokens) FROM usage_records")[0][0])
        assert 9_000 <= settled <= quota
        sums = "SUM(prompt_tokens), SUM(completion_tokens), SUM(requests), SUM(refusals)"
        rows = made.rows(f"SELECT {sums} FROM daily_totals")[0]
        assert int(rows[0] + rows[1]) == settled
        assert int(rows[3]) == 200


async def test_one_owner_and_the_lock_ends_with_its_connection(tmp_path, url):
    async with stages(tmp_path, DATABASE_URL=url):
        with pytest.raises(StoreLocked):
            await Stages(settings_for(tmp_path, DATABASE_URL=url)).start()
    async with stages(tmp_path, DATABASE_URL=url):
        pass


async def test_keys_seeding_and_changes_by_another_process(tmp_path, url):
    async with stages(tmp_path, DATABASE_URL=url) as made:
        assert made.call().caller.name == "team"
        other = Database(url)

        def change():
            with other.session():
                key, secret = accounts.create(other, {"name": "cli", "models": ["m"], "organisation": "lab"}, "test")
                accounts.set_organisation(other, "lab", 77, "test")
                return key, secret

        key, secret = await asyncio.to_thread(change)
        await until("the key is known", lambda: made.keyring.find(digest_of(secret)) is not None)
        assert made.call(secret=secret).caller.models == frozenset({"m"})
        await until("the quota too", lambda: made.keyring.caller(key.id).organisation_daily_tokens == 77)
        await made.store.change(lambda db: accounts.rotate(db, key.id, 0, "test"))
        await made.store.change(lambda db: accounts.delete(db, key.id, "test"))
        assert (await made.store.read(reports.audit))[0]["action"] == "key_deleted"
        assert [k.name for k in await made.store.read(accounts.keys)] == ["team"]
    async with stages(tmp_path, DATABASE_URL=url, GATEWAY_API_KEYS="team=another-secret") as made:
        assert made.call(secret="another-secret").caller.name == "team"
        assert made.keyring.find(digest_of(SECRET)).not_after is not None


async def test_holds_of_a_dead_process_and_leases(tmp_path, url):
    made = Stages(settings_for(tmp_path, DATABASE_URL=url))
    await made.start()
    call = made.call()
    await made.budget.hold(call)
    call.usage = Usage(4, 5, 0, known=True)
    await until("usage noted", lambda: made.rows("SELECT prompt_tokens, completion_tokens FROM holds") == [(4, 5)])
    await made.stop()
    async with stages(tmp_path, DATABASE_URL=url) as again:
        assert again.started.lost == 1
        assert again.rows("SELECT outcome, completion_tokens FROM usage_records") == [("lost", 5)]


async def test_reports(tmp_path, url):
    async with stages(tmp_path, DATABASE_URL=url) as made:
        for _ in range(3):
            call = made.call()
            await made.budget.hold(call)
            await made.end(call)
        made.store.add_energy([(made.budget.days.today(), made.call().caller.key_id, 2.5)])
        await made.store.change(lambda db: None)
        for group in reports.GROUPS:
            rows = await made.store.read(lambda db, group=group: reports.usage(db, None, None, group))
            assert [(r["prompt_tokens"], r["completion_tokens"], r["requests"]) for r in rows] == [(30, 60, 3)]
        key_id = made.call().caller.key_id
        assert await made.store.read(lambda db: reports.energy(db, key_id, made.budget.days.today())) == 2.5


async def test_a_server_that_goes_away_and_comes_back_loses_nothing(tmp_path):
    with postgres() as server:
        async with stages(tmp_path, DATABASE_URL=server.database(), SPOOL_DIR=tmp_path) as made:
            running = [made.call() for _ in range(3)]
            for call in running:
                await made.budget.hold(call)
            await asyncio.to_thread(server.stop)
            await made.end(running[0])
            assert made.store.aside == 1
            with pytest.raises(LedgerUnavailable):
                await made.budget.hold(made.call())
            assert made.call().caller.name == "team"  # the last good copy of the keys serves on
            await made.end(running[1])
            await asyncio.to_thread(server.start)
            await until("healed", lambda: made.ledger.healthy)
            await made.end(running[2])
            assert made.rows("SELECT COUNT(*), SUM(prompt_tokens) FROM usage_records") == [(3, 30)]
            assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
            second = Stages(settings_for(tmp_path, DATABASE_URL=made.settings.database_url))
            with pytest.raises(StoreLocked):  # the ownership came back with the connection
                await second.start()


async def test_a_server_that_cannot_be_reached_is_told(tmp_path):
    with pytest.raises(StoreUnavailable):
        await Stages(settings_for(tmp_path, DATABASE_URL="postgresql://gateway@127.0.0.1:1/none")).start()


def test_a_repeated_group_changes_nothing(url):
    from tests.doubles.records import record

    database = Database(url)
    with database.session():
        migrate(database)
        records = [record(f"r{n}", organisation=None if n % 2 else "lab") for n in range(150)]
        assert batch.write(database, batch.Group(records=records)) == 150
        assert batch.write(database, batch.Group(records=records)) == 0
        assert batch.write(database, batch.Group(records=[record("r1")])) == 1  # another call of that name
        assert int(database.rows("SELECT SUM(requests) FROM daily_totals")[0][0]) == 151
