"""What changes of a key while its calls are under way holds for them as well."""

import json
import threading
import time
from datetime import UTC, datetime

import pytest
from tests.doubles.gateway import Answer, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until
from tests.integration.server_client import Wire


def create(gateway: GatewayProcess, **fields: object) -> dict[str, str]:
    answer = gateway.admin("POST", "/admin/keys", {"name": "made", **fields})
    assert answer.status == 201, answer.body
    return answer.json


def soon(seconds: float) -> str:
    return datetime.fromtimestamp(time.time() + seconds, UTC).isoformat()


class Running(threading.Thread):
    """A stream that waits for `go_on` after some tokens; `answer` is what it became."""

    def __init__(self, gateway: GatewayProcess, key: str) -> None:
        super().__init__(daemon=True)
        self._gateway, self._key = gateway, key
        self.answer: Answer | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._gateway.chat("double:tokens=50,wait_after=20", key=self._key, stream=True)

    def text(self) -> bytes:
        self.join(60)
        assert self.answer is not None
        return self.answer.body


def in_flight(gateway: GatewayProcess) -> int:
    lines = gateway.get("/metrics").body.decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("gateway_in_flight_calls ")).split()[1]))


def test_an_end_that_is_set_meanwhile_ends_a_running_call(gateway: GatewayProcess, engine: VllmDouble):
    made = create(gateway)
    running = Running(gateway, made["secret"])
    wait_until("it runs", lambda: engine.state()["running"] == 1)

    assert gateway.admin("PATCH", f"/admin/keys/{made['id']}", {"expires_at": soon(1)}).status == 200

    text = running.text()  # nobody tells the engine to go on
    assert b'"key_expired"' in text
    assert b"[DONE]" not in text


def test_an_end_that_is_put_off_meanwhile_ends_no_running_call(gateway: GatewayProcess, engine: VllmDouble):
    end = time.time() + 6
    made = create(gateway, expires_at=datetime.fromtimestamp(end, UTC).isoformat())
    running = Running(gateway, made["secret"])
    wait_until("it runs", lambda: engine.state()["running"] == 1)

    assert gateway.admin("PATCH", f"/admin/keys/{made['id']}", {"expires_at": soon(3600)}).status == 200
    assert time.time() < end, "so slow a machine shows nothing"
    time.sleep(end + 1 - time.time())
    engine.go_on()

    assert b"[DONE]" in running.text()


@pytest.mark.parametrize("grace", [0, 3600], ids=["revoked", "with a grace"])
def test_a_call_whose_body_is_still_coming_is_refused_when_its_secret_is_revoked(gateway: GatewayProcess, grace: int):
    made = create(gateway)
    body = json.dumps({"model": "double", "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}).encode()
    with Wire(gateway.port) as wire:
        wire.send(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {made['secret']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body[:10]
        )
        wait_until("its head was read", lambda: in_flight(gateway) == 1)

        path = f"/admin/keys/{made['id']}/rotate"
        secret = gateway.admin("POST", path, {"grace_seconds": grace}).json["secret"]
        assert gateway.chat(key=secret, max_tokens=2).status == 200
        wire.send(body[10:])
        answer = wire.response("POST")

    assert answer is not None
    assert answer.status == (200 if grace else 401), answer.body
    if not grace:
        assert answer.json()["error"]["code"] == "invalid_api_key"
