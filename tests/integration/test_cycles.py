"""Calls leave nothing behind that only Python's cyclic collector could free, however they end.

The collector is told to come rarely (`app.GC_THRESHOLDS`): what waits for it grows memory, with bodies in it, and the more
it finds the longer it stops every call.
"""

from __future__ import annotations

from pathlib import Path

from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until
from tests.integration.server_client import Wire
from tests.integration.test_hot_path_cost import KEY, Counted

HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {key}\r\nContent-Length: {size}\r\n\r\n"
)


def asking(directive: str, stream: bool = False) -> str:
    more = ',"stream":true' if stream else ""
    return f'{{"model":"double","messages":[{{"role":"user","content":"double:{directive}"}}],"max_tokens":50{more}}}'


def ask(gateway: Counted, body: str, key: str = KEY) -> int:
    """One call on a connection of its own; the status, 0 where it broke before one came."""
    with Wire(gateway.port) as wire:
        wire.send((HEAD.format(key=key, size=len(body)) + body).encode())
        answer = wire.response("POST")
        return answer.status if answer is not None else 0


def hang_up_late(gateway: Counted, meanwhile: list[str]) -> list[int]:
    """A stream that holds the engine's only place until `meanwhile` has been asked, and is left then."""
    with Wire(gateway.port) as wire:
        body = asking("tokens=3000,pace_ms=5", stream=True).replace('"max_tokens":50', '"max_tokens":3000')
        wire.send((HEAD.format(key=KEY, size=len(body)) + body).encode())
        assert wire.receive()
        return [ask(gateway, each) for each in meanwhile]


def ended(gateway: Counted) -> int:
    return gateway.log.read_text().count('"event":"call_closed"')


def test_no_call_leaves_a_cycle_however_it_ends(tmp_path: Path) -> None:
    with VllmDouble() as engine:
        gateway = Counted(
            engine, tmp_path, "collected_gateway", FIRST_BYTE_SECONDS="1", MAX_BODY_BYTES="100000",
            BREAKER_FAILURES="1000", ENGINE_CONCURRENCY="1", QUEUE_SECONDS="1", DEFAULT_REQUESTS_PER_MINUTE="60",
        )  # fmt: skip
        try:
            before = ended(gateway)
            gateway.begin()
            found = [
                ask(gateway, asking("tokens=5")),
                ask(gateway, asking("tokens=5", stream=True)),
                ask(gateway, asking("tokens=5"), key="sk-nobody"),
                ask(gateway, '{"model":'),
                ask(gateway, asking("tokens=5").replace('"max_tokens":50', '"max_tokens":"x"')),
                ask(gateway, asking("tokens=5").replace('"model":"double"', '"model":"nobody"')),
                ask(gateway, "x" * 200_000),
                ask(gateway, asking("tokens=5,status=400")),
                ask(gateway, asking("tokens=5,status=500")),
                ask(gateway, asking("tokens=5,die=headers")),
                ask(gateway, asking("tokens=5,die_after=2")),
                ask(gateway, asking("tokens=9,die_after=4,pace_ms=5", stream=True)),
                ask(gateway, asking("tokens=9,error_after=4,pace_ms=5", stream=True)),
                ask(gateway, asking("tokens=5,hang=headers")),
                *hang_up_late(gateway, meanwhile=[asking("tokens=5")]),
            ]
            calls = len(found) + 1
            limited = 0
            while limited != 429 and calls < 200:
                limited = ask(gateway, asking("tokens=1"))
                calls += 1
            wait_until("all calls have ended", lambda: ended(gateway) - before >= calls)
            total, kinds = gateway.end()
            print(found, limited, calls)
            assert found == [200, 200, 401, 400, 400, 404, 413, 400, 502, 502, 502, 200, 200, 504, 503], found
            assert limited == 429
            assert total == 0, kinds
        finally:
            gateway.process.kill()
            gateway.process.wait()
