"""An older database is put in place under a running gateway: what it says holds, at once and from then on."""

from collections.abc import Iterator

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.postgres import postgres
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

from gateway.store import Database

TABLES = ("keys", "limits", "key_secrets", "organisations", "meta")


@pytest.fixture(params=["sqlite", "postgresql"])
def gateway(request: pytest.FixtureRequest, engine: VllmDouble) -> Iterator[GatewayProcess]:
    if request.param == "sqlite":
        with GatewayProcess(VLLM_URL=engine.url) as running:
            yield running
        return
    with postgres() as server, GatewayProcess(VLLM_URL=engine.url, DATABASE_URL=server.database()) as running:
        yield running


def read(gateway: GatewayProcess) -> dict[str, list[tuple]]:
    """All rows about keys."""
    database = Database(gateway.environment["DATABASE_URL"])
    with database.session():
        return {table: database.rows(f"SELECT * FROM {table}") for table in TABLES}


def put_back(gateway: GatewayProcess, tables: dict[str, list[tuple]]) -> None:
    """As a restore does it: all at once, under the running gateway."""
    database = Database(gateway.environment["DATABASE_URL"])
    with database.session(), database.transaction():
        for table, rows in tables.items():
            database.run(f"DELETE FROM {table}")
            for row in rows:
                database.run(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)


def opens(gateway: GatewayProcess, secret: str) -> bool:
    return gateway.get("/v1/models", secret).status == 200


def test_an_older_database_holds(gateway: GatewayProcess) -> None:
    key_id = gateway.admin("GET", "/admin/keys").json["data"][0]["id"]
    before = read(gateway)
    later = gateway.admin("POST", "/admin/keys", {"name": "made after the backup"}).json["secret"]
    rotated = gateway.admin("POST", f"/admin/keys/{key_id}/rotate").json["secret"]
    for number in range(3):
        gateway.admin("PATCH", f"/admin/keys/{key_id}", {"daily_tokens": number + 1})
    assert (opens(gateway, KEY), opens(gateway, rotated), opens(gateway, later)) == (False, True, True)
    put_back(gateway, before)
    wait_until("the key of the backup is valid again", lambda: opens(gateway, KEY))
    assert (opens(gateway, rotated), opens(gateway, later)) == (False, False)
    assert gateway.get("/v1/usage").json["limit_tokens"] is None
    gateway.admin("POST", f"/admin/keys/{key_id}/disable")
    assert gateway.get("/v1/models").code == "key_disabled"
