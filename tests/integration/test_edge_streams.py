"""Streams through nginx and TLS: each event at once, uncompressed, and a client that goes away is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.doubles import edge_running
from tests.doubles.edge_running import Edge, needs_nginx

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge_running.edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


@pytest.mark.parametrize("http2", [False, True])
def test_each_event_arrives_when_it_is_sent(edge: Edge, http2: bool) -> None:
    """Each event is sent only when the one before it has arrived: a buffer anywhere would hold the stream for good."""
    arrived: list[int] = []
    with (
        edge_running.httpx.Client(base_url=f"http://127.0.0.1:{edge.upstream.port}") as behind,
        edge.client(http2) as client,
        client.stream("POST", "/v1/stream?chunks=50&gap=0&steps=1", json={}) as answer,
    ):
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                arrived.append(json.loads(line.removeprefix("data: "))["number"])
                if len(arrived) < 50:
                    behind.post("/v1/step")
    assert arrived == list(range(50))


def test_a_stream_is_never_compressed_or_held_for_a_length(edge: Edge) -> None:
    with edge.client() as client:
        answer = client.get("/v1/stream?chunks=3&gap=0", headers={"accept-encoding": "gzip, br"})
    assert "content-encoding" not in answer.headers
    assert "content-length" not in answer.headers
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_the_gateway_learns_at_once_that_the_client_left(edge: Edge) -> None:
    """Long before it would have answered."""
    with edge.client() as client, client.stream("GET", "/v1/stream?chunks=5&gap=0") as answer:
        answer.read()
    with pytest.raises(edge_running.httpx.ReadTimeout), edge.client() as client:
        client.get("/v1/hold?seconds=600", timeout=edge_running.httpx.Timeout(60, read=1))
    assert edge.upstream.next_line() == "left"


def test_a_silent_stream_outlives_nginx_default_of_a_minute(edge: Edge) -> None:
    config = (edge.folder / "nginx.conf").read_text()
    assert "proxy_read_timeout 3600s;" in config
