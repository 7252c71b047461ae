"""How often one call is tried, and what it leaves of the retries of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from tests.doubles.flow_site import metric
from tests.doubles.gateway import GatewayProcess
from tests.doubles.scripted_engine import ScriptedEngine, whole
from tests.doubles.waiting import wait_until

BUSY = whole({"error": {"message": "busy"}}, 503)


@pytest.fixture
def engines() -> Iterator[list[ScriptedEngine]]:
    with ScriptedEngine(busy=BUSY) as a, ScriptedEngine(busy=BUSY) as b:
        yield [a, b]


@pytest.fixture
def gateway(engines: list[ScriptedEngine]) -> Iterator[GatewayProcess]:
    backends = [{"name": name, "url": engine.url} for name, engine in zip("ab", engines, strict=True)]
    with GatewayProcess(BACKENDS=json.dumps(backends), RETRY_RATIO=0.01) as running:
        wait_until("both engines are known", lambda: metric(running, "gateway_backend_up") == 2)  # one makes it ready
        yield running


def asked(engines: list[ScriptedEngine]) -> list[int]:
    return [engine.asked.get("busy", 0) for engine in engines]


def test_an_engine_that_has_no_room_is_asked_once_for_a_call(
    gateway: GatewayProcess, engines: list[ScriptedEngine]
) -> None:
    answer = gateway.chat("script:busy")

    assert (answer.status, answer.code) == (503, "no_backend")
    assert asked(engines) == [1, 1]
    assert metric(gateway, "gateway_retries_total") == 1


def test_a_call_that_can_go_nowhere_else_uses_up_no_retry() -> None:
    """Ten at once is all that there are after a quiet time; here they would be gone."""

    def breaks_once(to: BaseHTTPRequestHandler) -> None:
        if engine.asked["breaks_once"] == 1:
            to.close_connection = True
        else:
            engine.scripts["default"](to)

    with (
        ScriptedEngine(busy=BUSY, breaks_once=breaks_once) as engine,
        GatewayProcess(VLLM_URL=engine.url, RETRY_RATIO=0.01) as gateway,
    ):
        for _ in range(12):
            assert gateway.chat("script:busy").status == 503

        assert gateway.chat("script:breaks_once").status == 200
        assert engine.asked["breaks_once"] == 2
