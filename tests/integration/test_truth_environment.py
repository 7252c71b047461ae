"""Keys of GATEWAY_API_KEYS across restarts: what an operator decided is decided, whatever the variable still says."""

from collections.abc import Iterator

import pytest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.postgres import postgres
from tests.doubles.vllm import VllmDouble

LEAKED = "sk-leaked-0123456789abcdef"
CHOSEN = "sk-chosen-0123456789abcdef"


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, engine: VllmDouble) -> Iterator[GatewayProcess]:
    """A gateway whose one key comes from the variable; not started."""
    settings = {"VLLM_URL": engine.url, "GATEWAY_API_KEYS": f"team={LEAKED}"}
    if request.param == "sqlite":
        yield GatewayProcess(**settings)
        return
    with postgres() as server:
        yield GatewayProcess(**settings, DATABASE_URL=server.database())


def opens(gateway: GatewayProcess, secret: str) -> bool:
    return gateway.get("/v1/models", secret).status == 200


def rotate(gateway: GatewayProcess, grace_seconds: float = 0) -> str:
    key_id = gateway.admin("GET", "/admin/keys").json["data"][0]["id"]
    return gateway.admin("POST", f"/admin/keys/{key_id}/rotate", {"grace_seconds": grace_seconds}).json["secret"]


def restart(gateway: GatewayProcess, keys: str) -> list[dict]:
    """A restart with `keys` as the variable; returns what it warned of."""
    gateway.terminate()
    gateway.lines.clear()
    gateway.environment["GATEWAY_API_KEYS"] = keys
    gateway.start()
    return [line for line in gateway.lines if line["event"] == "seeded_secret_rotated"]


def test_a_rotation_outlives_restarts_and_the_variable_is_told_of(site: GatewayProcess) -> None:
    with site as gateway:
        new = rotate(gateway)
        warned = restart(gateway, f"team={LEAKED}")
        assert (opens(gateway, LEAKED), opens(gateway, new)) == (False, True)
        assert [line["name"] for line in warned] == ["team"]
        assert LEAKED not in str(gateway.lines)
        # What the variable then says works beside it, and goes again with the variable.
        assert restart(gateway, f"team={CHOSEN}") == []
        assert (opens(gateway, CHOSEN), opens(gateway, LEAKED), opens(gateway, new)) == (True, False, True)
        restart(gateway, "")
        assert (opens(gateway, CHOSEN), opens(gateway, LEAKED), opens(gateway, new)) == (False, False, True)
        restart(gateway, f"team={CHOSEN}")
        assert opens(gateway, CHOSEN)
        keys = gateway.admin("GET", "/admin/keys").json["data"]
        assert [(key["name"], key["origin"]) for key in keys] == [("team", "environment")]


def test_a_secret_made_by_a_rotation_may_move_into_the_variable(site: GatewayProcess) -> None:
    with site as gateway:
        new = rotate(gateway, grace_seconds=3600)
        assert restart(gateway, f"team={new}") == []
        assert (opens(gateway, LEAKED), opens(gateway, new)) == (True, True)  # the grace time is the operator's too
        restart(gateway, f"team={CHOSEN}")
        assert (opens(gateway, CHOSEN), opens(gateway, new)) == (True, False)  # it had become the variable's
