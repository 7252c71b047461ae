"""Calls whose body has no length in its head: bounds hold, and room is taken for what has come, not for what might."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.doubles.flow_site import PATHS, asking
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import PATIENCE

BODY_BYTES = 20_000


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    bounds = {"MAX_BODY_BYTES": BODY_BYTES, "BODIES_IN_FLIGHT_BYTES": 3 * BODY_BYTES}
    with GatewayProcess(VLLM_URL=engine.url, **bounds) as running:
        yield running


def send(gateway: GatewayProcess, body: dict[str, Any]) -> socket.socket:
    """A call in chunks, with all its bytes at once."""
    data = json.dumps(body).encode()
    head = (
        f"POST {PATHS['chat']} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=PATIENCE)
    connection.sendall(head.encode() + f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n")
    return connection


@pytest.mark.parametrize("size", [BODY_BYTES, 3 * BODY_BYTES, 20 * BODY_BYTES])
def test_a_body_that_is_too_large_is_refused_also_if_it_comes_at_once(gateway: GatewayProcess, size: int) -> None:
    with send(gateway, asking("chat", "tokens=1", user="x" * size)) as connection:
        answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"request_too_large" in answer


def test_small_bodies_take_little_room_however_large_they_might_have_been(
    gateway: GatewayProcess, engine: VllmDouble
) -> None:
    """As many as would fill the room ten times over, if each kept what the largest body needs."""
    calls = [send(gateway, asking("chat", "tokens=2000,pace_ms=20", stream=True)) for _ in range(30)]
    answers = [call.recv(65536) for call in calls]
    try:
        assert {answer.split(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
        assert gateway.chat("hello", user="x" * (BODY_BYTES // 2)).status == 200
    finally:
        for call in calls:
            call.close()
