"""Days of life in a short time: the whole path under churn, faults and turning days, judged by growth and by the ledger."""

import json
import os
from pathlib import Path

import pytest
from tests.doubles.edge_running import needs_nginx
from tests.doubles.postgres import postgres, programs
from tests.doubles.wall_clock import needs_compiler
from tests.soak import run

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
