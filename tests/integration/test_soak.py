"""Days of life in a short time: the whole path under churn, faults and turning days, judged by growth and by the ledger."""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.doubles.edge_running import needs_nginx
from tests.doubles.postgres import postgres, programs
from tests.doubles.wall_clock import needs_compiler
from tests.soak import run
from tests.soak.deeds import Deeds
from tests.soak.traffic import Keys

RESULTS = Path(__file__).resolve().parents[2] / ".state" / "soak"
pytestmark = [
    needs_nginx,
    needs_compiler,
]


def prove(folder: Path, plan: run.Plan, name: str, database: str | None = None) -> None:
    found = run.run(folder, plan, database)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({key: value for key, value in found.items() if key != "curve"}, indent=1))
    assert not found["problems"], "\n".join(found["problems"])
    assert found["ledger"]["days"] >= int(plan.seconds / plan.day_seconds)
    assert found["lives"] > 2, "the gateway was not restarted"


async def test_a_deed_that_fails_is_told_and_costs_nothing_else():
    deeds = Deeds(
        SimpleNamespace(gateway=SimpleNamespace(environment={"DATABASE_URL": "postgresql:"})), Keys({}), seed=1
    )
    again = asyncio.Event()

    async def fails():
        if deeds.problems:
            again.set()
        raise AssertionError("not within 30 s")

    deeds.reload = fails
    deeds.start(0, {"reload": 0.01})
    await asyncio.wait_for(again.wait(), 60)
    await deeds.stop()
    assert set(deeds.problems) == {"reload: AssertionError: not within 30 s"}


@pytest.mark.timeout(300)
def test_days_in_a_minute(tmp_path):
    prove(tmp_path, run.SHORT, "short")


@pytest.mark.long
@pytest.mark.timeout(4500)
def test_days_in_an_hour(tmp_path):
    """`SOAK_DATABASE=postgresql` takes PostgreSQL instead of SQLite."""
    os.nice(10)
    if os.environ.get("SOAK_DATABASE") != "postgresql":
        prove(tmp_path, run.LONG, "hour")
        return
    if programs() is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres() as server:
        prove(tmp_path, run.LONG, "hour-postgresql", server.database())
