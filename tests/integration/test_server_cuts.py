"""The same bytes, cut anywhere by the network, get the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.integration.server_client import Server, Wire
from tests.integration.test_server_refusals import CORPUS
from tests.integration.test_server_requests import CASES, seen

WHOLE = {
    name: (b"".join(pieces), methods) for name, (pieces, methods) in CASES.items() if sum(map(len, pieces)) < 5_000
}
REFUSED = {name: (data, ("POST",)) for name, data in CORPUS.items()}
ALL = WHOLE | REFUSED


@pytest.fixture(scope="module")
def fast() -> Iterator[Server]:
    with Server("fast", linger_seconds=60.0, sweep_seconds=0.05) as server:
        yield server


def answers(server: Server, pieces: list[bytes], methods: tuple[str, ...]) -> list[Any]:
    """What the client sees; interim responses may differ, as the body may be there before it is asked for."""
    with Wire(server.port) as wire:
        for piece in pieces:
            wire.send(piece)
        return [seen(wire.response(method)) for method in methods]


@pytest.mark.parametrize("name", ALL)
def test_one_byte_at_a_time(fast: Server, name: str) -> None:
    data, methods = ALL[name]
    step = 1 + len(data) // 1_500  # the few long ones in larger pieces
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert answers(fast, pieces, methods) == answers(fast, [data], methods)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut(fast: Server, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ALL)))
    whole, methods = ALL[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert answers(fast, pieces, methods) == answers(fast, [whole], methods)


FRAGMENTS = [
    b"GET / HTTP/1.1\r\n", b"POST /echo HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n", b"\n", b"\r", b"0\r\n\r\n", b"A: b",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"abc", b" ", b"\0", b"HTTP/1.1",
    b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"OPTIONS * HTTP/1.0\r\n", b"\xff", b":",
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=20)), min_size=1, max_size=15))
def test_any_bytes_leave_the_server_standing(fast: Server, pieces: list[bytes]) -> None:
    """No bytes get a 5xx other than 501 and 505, and the server still answers the next client."""
    with Wire(fast.port) as wire:
        for piece in pieces:
            wire.send(piece)
        wire.send(b"\r\n\r\n\r\n\r\n")
        wire.socket.settimeout(0.05)
        try:
            response = wire.response("POST")
        except TimeoutError:
            response = None  # it waits for the rest of a body
        if response is not None:
            assert response.status < 500 or response.status in (501, 505)
    with Wire(fast.port) as wire:
        wire.send(b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n")
        response = wire.response()
        assert response is not None
        assert response.status == 200
