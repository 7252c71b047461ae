"""Old usage records go, wherever they lie; totals stay."""

import asyncio
import time

import pytest
from tests.doubles.postgres import postgres
from tests.doubles.records import record
from tests.doubles.stages import stages
from tests.doubles.waiting import until

from gateway.store import Database, batch, migrate
from gateway.store.retention import Retention

DAY = 86_400.0


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/gateway.sqlite3"
        return
    with postgres() as server:
        yield server.database()


@pytest.fixture
def database(url):
    database = Database(url)
    with database.session():
        migrate(database)
        yield database


def fill(database: Database, *parts: tuple[int, float]) -> None:
    """Records in the order of `parts`: how many, and how old (days)."""
    now = time.time()
    ages = [age for count, age in parts for _ in range(count)]
    records = [record(f"r{number}", started_at=now - age * DAY) for number, age in enumerate(ages)]
    for start in range(0, len(records), 500):
        batch.write(database, batch.Group(records=records[start : start + 500]))


def left(database: Database) -> int:
    return int(database.rows("SELECT COUNT(*) FROM usage_records")[0][0])


@pytest.mark.parametrize(
    "young",
    [(0, 0), (1, -365), (600, -365), (600, 1)],
    ids=["none", "one from the future", "many from the future", "many that were from the future"],
)
def test_all_that_is_old_goes_and_nothing_else(database, young):
    fill(database, young, (1200, 100), (10, 0), (3, 100))
    retention = Retention()
    passes = [retention.forget(database, time.time() - 90 * DAY) for _ in range(8)]
    assert left(database) == young[0] + 10
    assert passes[:2] == [True, True]  # it goes on as long as there is something
    assert passes[-1] is False
    assert database.rows("SELECT SUM(requests) FROM daily_totals") == [(young[0] + 1213,)]


def test_a_large_table_is_not_looked_at_whole(database, monkeypatch):
    fill(database, (4000, 1), (1, 100))
    seen = 0
    rows = database.rows

    def counted(sql, parameters=()):
        nonlocal seen
        found = rows(sql, parameters)
        seen += found[0][0]
        return found

    retention = Retention()
    with monkeypatch.context() as patched:
        patched.setattr(database, "rows", counted)
        assert retention.forget(database, time.time() - 90 * DAY) is False
        assert seen <= 2500
        retention.forget(database, time.time() - 90 * DAY)
        retention.forget(database, time.time() - 90 * DAY)
    assert left(database) == 4000


async def test_it_runs_by_itself_behind_records_from_the_future(tmp_path, url):
    def prepare():
        database = Database(url)
        with database.session():
            migrate(database)
            fill(database, (600, -365), (1500, 100))

    await asyncio.to_thread(prepare)
    async with stages(tmp_path, DATABASE_URL=url) as made:
        made.store._next_sweep = 0.0
        await until("old records go", lambda: made.rows("SELECT COUNT(*) FROM usage_records") == [(600,)])
