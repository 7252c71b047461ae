"""Names and ids that come from outside: what no database and no terminal should see is refused before."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.postgres import postgres
from tests.doubles.vllm import VllmDouble


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    """A gateway on PostgreSQL, which takes less than SQLite does."""
    with postgres() as server, GatewayProcess(VLLM_URL=engine.url, DATABASE_URL=server.database()) as running:
        yield running


@pytest.mark.parametrize("name", [" ", "a\x1b[31mb", "a\0b", "a\nb", "x" * 201])
def test_an_organisation_is_named_as_on_a_key(gateway: GatewayProcess, name: str) -> None:
    answer = gateway.admin("PATCH", f"/admin/organisations/{quote(name)}", {"daily_tokens": 5})
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", "organisation")
    assert {one["name"] for one in gateway.admin("GET", "/admin/organisations").json["data"]} <= {"acme"}


def test_an_organisation_has_one_name_however_it_is_written(gateway: GatewayProcess) -> None:
    assert gateway.admin("PATCH", "/admin/organisations/%20acme%20", {"daily_tokens": 5}).json["name"] == "acme"
    assert gateway.cli("keys", "organisation", " acme", "--daily-tokens", "7").returncode == 0
    refused = gateway.cli("keys", "organisation", "", "--daily-tokens", "7")
    assert (refused.returncode, refused.stderr) == (1, "keys: 'organisation' must be 1 to 200 printable characters.\n")
    organisations = gateway.admin("GET", "/admin/organisations").json["data"]
    assert organisations == [{"name": "acme", "daily_tokens": 7, "keys": 0}]


@pytest.mark.parametrize("key_id", ["key_%00", "%00", "key_%C3%A9", "key_%EF%BF%BF", "x" * 5000])
def test_a_key_that_cannot_be_is_not_found_and_the_ledger_does_not_hear_of_it(
    gateway: GatewayProcess, key_id: str
) -> None:
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"daily_tokens": 5}),
        ("POST", "/rotate", {}),
        ("POST", "/disable", None),
        ("DELETE", "", None),
    ):
        answer = gateway.admin(method, f"/admin/keys/{key_id}{path}", body)
        assert (answer.status, answer.code) == (404, "key_not_found")
    assert "gateway_ledger_failures_total 0" in gateway.get("/metrics").body.decode()
    assert gateway.get("/ready").status == 200
