"""How many calls a key has made today: memory and ledger count the same ones, so that a restart changes no number."""

import json

from tests.doubles.gateway import GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until
from tests.integration.server_client import Wire


def send(gateway: GatewayProcess, key: str, text: str, part: int | None = None) -> Wire:
    """A call that is left open, of whose body only `part` bytes were sent."""
    body = {"model": "double", "stream": True, "max_tokens": 300, "messages": [{"role": "user", "content": text}]}
    raw = json.dumps(body).encode()
    wire = Wire(gateway.port)
    wire.send(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
        + raw[:part]
    )
    return wire


def under_way(gateway: GatewayProcess) -> int:
    lines = gateway.get("/metrics").body.decode().splitlines()
    return int(float(next(line for line in lines if line.startswith("gateway_in_flight_calls ")).split()[1]))


def requests(gateway: GatewayProcess, key: str) -> int:
    return int(gateway.get("/v1/usage", key=key).json["requests"])


def closed(gateway: GatewayProcess) -> list[str]:
    return [line["outcome"] for line in gateway.lines if line.get("event") == "call_closed"]


def test_calls_that_were_left_before_they_held_anything_are_counted_before_and_after_a_restart():
    with VllmDouble() as engine, GatewayProcess(VLLM_URL=engine.url) as gateway:
        limits = {"name": "left", "daily_tokens": 600, "organisation": "lab"}
        key = str(gateway.admin("POST", "/admin/keys", limits).json["secret"])
        running = send(gateway, key, "double:tokens=20,wait_after=5")
        wait_until("one runs", lambda: engine.state()["running"] == 1)
        waiting = send(gateway, key, "hello")  # for what the first one holds
        reading = send(gateway, key, "hello", part=10)
        wait_until("all are known", lambda: under_way(gateway) == 3)

        waiting.socket.close()
        reading.socket.close()
        wait_until("they are gone", lambda: under_way(gateway) == 1)
        engine.go_on()
        assert running.response("POST") is not None
        running.socket.close()
        refused = gateway.chat(key=key, max_tokens=2, n=10**6)
        assert refused.status == 400  # no call, as far as a day is concerned
        wait_until("all have ended", lambda: under_way(gateway) == 0)
        told = wait_until("all are told", lambda: ended if len(ended := closed(gateway)) == 4 else None)
        assert sorted(told) == ["cancelled", "cancelled", "ok", "refused"]

        before = requests(gateway, key)
        gateway.terminate()
        gateway.start()

        assert before == requests(gateway, key) == 3
