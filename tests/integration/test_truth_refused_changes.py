"""What an operator is told of a change while the database fails, from outside."""

import psycopg
from tests.doubles.gateway import GatewayProcess
from tests.doubles.postgres import postgres
from tests.doubles.vllm import VllmDouble


def test_a_change_that_failed_halfway_is_not_told_as_refused(engine: VllmDouble) -> None:
    """A server that fails may have committed before: who reads "nothing was changed" would trust it."""
    with postgres() as server:
        url = server.database()
        with GatewayProcess(VLLM_URL=engine.url, DATABASE_URL=url) as gateway:
            key_id = gateway.admin("GET", "/admin/keys").json["data"][0]["id"]
            with psycopg.connect(url) as locker:
                locker.execute("LOCK TABLE limits IN ACCESS EXCLUSIVE MODE")
                answer = gateway.admin("PATCH", f"/admin/keys/{key_id}", {"daily_tokens": 5})
            assert (answer.status, answer.code) == (503, "ledger_unavailable")
            assert "not known" in answer.json["error"]["message"]
