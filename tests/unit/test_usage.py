"""Reading usage: the same numbers as a table, CSV and JSON; and the comparison with the engines."""

import csv
import io
import json
import time

import pytest

from gateway import cli_usage
from gateway.call import UsageRecord
from gateway.reconciliation import Reconciliation
from gateway.settings import load
from gateway.store import Database, accounts, batch, migrate


@pytest.fixture
def settings(tmp_path):
    settings = load({"DATABASE_URL": f"sqlite:///{tmp_path}/g.sqlite3"})
    database = Database(settings.database_url)
    with database.session():
        migrate(database)
        keys = [accounts.create(database, {"name": name}, "test")[0].id for name in ("ann", "bob")]
        records = [
            UsageRecord(
                request_id=f"r{n}", key_id=keys[n % 2], organisation="lab" if n % 2 else None, model=f"m{n % 3}",
                endpoint="chat_completions", prompt_tokens=10, completion_tokens=n, cached_tokens=1,
                outcome="refused" if n == 5 else "ok", code=None, status=200, stream=False, started_at=time.time(),
                duration_seconds=1, queue_seconds=0, first_token_seconds=None, trace_id=None, backend=None,
                day=f"2026-01-0{n % 2 + 1}",
            )
            for n in range(12)
        ]  # fmt: skip
        batch.write(database, batch.Group(records=records))
    return settings


def usage(settings, capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli_usage.run(argv, settings) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("by", "rows"), [("key", 2), ("organisation", 2), ("model", 3), ("day", 2)])
def test_every_grouping_adds_up_to_the_same(settings, capsys, by, rows):
    data = json.loads(usage(settings, capsys, "--by", by, "--json"))["data"]
    assert len(data) == rows
    assert sum(row["completion_tokens"] for row in data) == sum(range(12))
    assert sum(row["prompt_tokens"] for row in data) == 120
    assert sum(row["requests"] for row in data) == 11
    assert sum(row["refusals"] for row in data) == 1


def test_days_are_included_at_both_ends(settings, capsys):
    for argv, days in (
        (("--from", "2026-01-02"), ["2026-01-02"]),
        (("--to", "2026-01-01"), ["2026-01-01"]),
        (("--from", "2026-01-01", "--to", "2026-01-02"), ["2026-01-01", "2026-01-02"]),
        (("--from", "2027-01-01"), []),
    ):
        data = json.loads(usage(settings, capsys, "--by", "day", "--json", *argv))["data"]
        assert [row["day"] for row in data] == days


def test_csv_and_table_show_what_json_shows(settings, capsys):
    data = json.loads(usage(settings, capsys, "--json"))["data"]
    rows = list(csv.DictReader(io.StringIO(usage(settings, capsys, "--csv"))))
    assert [{k: str(v) for k, v in row.items() if v is not None} for row in data] == [
        {k: v for k, v in row.items() if v} for row in rows
    ]
    table = usage(settings, capsys)
    assert {row["name"] for row in data} == {"ann", "bob"}
    for row in data:
        assert row["key_id"] in table
    assert "(none)" in usage(settings, capsys, "--from", "2030-01-01")


@pytest.mark.parametrize("by", ["key", "organisation", "model", "day"])
def test_csv_has_its_head_line_without_any_rows(settings, capsys, by):
    full = usage(settings, capsys, "--csv", "--by", by)
    assert usage(settings, capsys, "--csv", "--by", by, "--from", "2030-01-01") == full.partition("\n")[0] + "\n"


def test_joules_stand_where_they_were_measured(settings, capsys):
    database = Database(settings.database_url)
    with database.session():
        ann, bob = accounts.keys(database)
        rows = [("2026-01-01", ann.id, 1.5), ("2026-01-02", ann.id, 2.0)]
        batch.write(database, batch.Group(energy=rows))
    by_key = {row["key_id"]: row["energy_joules"] for row in json.loads(usage(settings, capsys, "--json"))["data"]}
    assert by_key == {ann.id: 3.5, bob.id: None}
    by_day = json.loads(usage(settings, capsys, "--by", "day", "--to", "2026-01-01", "--json"))["data"]
    assert [row["energy_joules"] for row in by_day] == [1.5]
    assert "energy_joules" not in json.loads(usage(settings, capsys, "--by", "model", "--json"))["data"][0]


def test_a_wrong_day_is_told(settings):
    with pytest.raises(SystemExit) as end:
        cli_usage.run(["--from", "yesterday"], settings)
    assert end.value.code == 2


class TestReconciliation:
    def make(self, *samples):
        answers = iter(samples)
        self.settled = 0

        async def read():
            return next(answers)

        return Reconciliation(read, lambda: self.settled, list)

    async def test_what_was_counted_before_does_not_matter(self):
        reconciliation = self.make({"a": (5000, 0)}, {"a": (5100, 0)}, {"a": (5100, 0)})
        assert await reconciliation.sample() == 0
        assert await reconciliation.sample() == 100
        self.settled = 100
        assert await reconciliation.sample() == 0

    async def test_a_restarted_engine_counts_from_zero(self):
        reconciliation = self.make({"a": (5000, 0)}, {"a": (30, 0)}, {"a": (50, 0)})
        await reconciliation.sample()
        self.settled = 30
        assert await reconciliation.sample() == 0
        self.settled = 40
        assert await reconciliation.sample() == 10

    async def test_engines_may_come_and_go(self):
        reconciliation = self.make(
            {}, {"a": (10, 0)}, {"a": (20, 0), "b": (700, 0)}, {"b": (705, 0)}, {"a": (25, 0), "b": (705, 0)}
        )
        self.settled = 3
        assert await reconciliation.sample() == 0
        assert await reconciliation.sample() == 0
        self.settled += 10
        assert await reconciliation.sample() == 0
        self.settled += 10
        assert await reconciliation.sample() == -5
        assert await reconciliation.sample() == 0

    async def test_what_the_supervisor_itself_asked_for_is_no_drift(self):
        reconciliation = self.make({"a": (500, 90)}, {"a": (520, 92)}, {"a": (520, 110)}, {"a": (4, 4)})
        await reconciliation.sample()
        assert await reconciliation.sample() == 18  # counted by vLLM, not yet by its supervisor's side
        assert await reconciliation.sample() == 0
        assert await reconciliation.sample() == 0  # both began anew
