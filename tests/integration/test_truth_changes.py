"""What changes of a key while its calls are under way holds for them as well."""

import threading
import time
from datetime import UTC, datetime

from tests.doubles.gateway import Answer, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until


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
