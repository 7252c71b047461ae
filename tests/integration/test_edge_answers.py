"""nginx's answers seen from outside: what passes, what is closed, and that every refusal has OpenAI's shape."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from tests.doubles import edge_running
from tests.doubles.edge_running import Edge, needs_nginx
from tests.doubles.waiting import wait_until

pytestmark = needs_nginx
ID = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge_running.edge(tmp_path_factory.mktemp("edge"), requests_per_second=0, connections=0) as running:
        yield running


def assert_openai_error(answer: httpx.Response, status: int, code: str) -> None:
    """The one shape of every error."""
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["code"] == code
    assert answer.headers.get_list("x-request-id") != []
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/ready", "/v1/models/org%2Fname", "/v1/x?a=1&b=.."])
def test_what_passes_passes_unchanged(edge: Edge, path: str) -> None:
    with edge.client() as client:
        answer = client.get(path)
    assert answer.status_code == 200
    assert answer.json()["path"] == path


@pytest.mark.parametrize(
    "path",
    [
        "/metrics", "/admin/keys", "/admin", "/", "/docs", "/invocations", "/v2/x", "/grafana/", "/stub_status",
        "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/..%2fadmin/keys", "/metrics/../v1/models", "//metrics",
        "/admin/%2e%2e/v1/models", "/V1/models", "/health/x",
    ],
)  # fmt: skip
def test_everything_else_is_closed(edge: Edge, path: str) -> None:
    # Raw, because a client library would tidy the path up.
    context = edge.trust()
    plain = socket.create_connection(("127.0.0.1", edge.https))
    with context.wrap_socket(plain, server_hostname="localhost") as secure:
        secure.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: secure.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]
    assert b'"code": "unknown_route"' in answer


def test_a_body_above_the_limit_is_413(edge: Edge) -> None:
    with edge.client() as client:
        assert client.post("/v1/x", content=b"x" * 1_000_000).json()["body_bytes"] == 1_000_000
        answer = client.post("/v1/x", content=b"x" * (edge.settings.max_body_bytes + 1))
    assert_openai_error(answer, 413, "request_too_large")
    assert str(edge.settings.max_body_bytes) in answer.json()["error"]["message"]


def test_the_largest_body_passes(edge: Edge) -> None:
    with edge.client() as client:
        answer = client.post("/v1/x", content=b"x" * edge.settings.max_body_bytes)
    assert answer.json()["body_bytes"] == edge.settings.max_body_bytes


def test_a_gateway_that_drops_the_call_is_502(edge: Edge) -> None:
    with edge.client() as client:
        answer = client.post("/v1/drop", json={})
    assert_openai_error(answer, 502, "upstream_error")
    assert answer.headers["retry-after"] == "2"


def test_a_gateway_that_is_down_is_502_and_comes_back_without_help(tmp_path: Path) -> None:
    with edge_running.edge(tmp_path) as edge, edge.client() as client:
        port = edge.upstream.port
        edge.upstream.process.kill()
        edge.upstream.process.wait(60)
        assert_openai_error(client.get("/v1/models"), 502, "upstream_error")
        with edge_running.upstream(port):
            assert client.get("/v1/models").status_code == 200


def test_headers_and_lines_too_large_and_plain_http(edge: Edge) -> None:
    with edge.client() as client:
        assert_openai_error(client.get("/v1/x", headers={"x-large": "x" * 40_000}), 431, "invalid_request")
        assert_openai_error(client.get("/v1/" + "x" * 40_000), 414, "invalid_request")
    plain = httpx.get(f"http://127.0.0.1:{edge.https}/v1/models")
    assert_openai_error(plain, 400, "invalid_request")


@pytest.mark.parametrize("line", [b"NOT HTTP", b"GET /v1/%zz HTTP/1.1", b"GET /v1/x HTTP/1.1\r\nContent-Length: -1"])
def test_what_is_not_http_is_400(edge: Edge, line: bytes) -> None:
    plain = socket.create_connection(("127.0.0.1", edge.https))
    with edge.trust().wrap_socket(plain, server_hostname="localhost") as secure:
        secure.sendall(line + b"\r\nHost: localhost\r\n\r\n")
        answer = b"".join(iter(lambda: secure.recv(65536), b""))
    assert b'"code": "invalid_request"' in answer, answer


def test_plain_http_is_redirected_and_keeps_method_and_query(edge: Edge) -> None:
    answer = httpx.post(f"http://127.0.0.1:{edge.http}/v1/x?a=1", content=b"{}")
    assert answer.status_code == 308
    assert answer.headers["location"] == f"https://127.0.0.1:{edge.https}/v1/x?a=1"


def test_the_gateways_own_refusals_pass_untouched(edge: Edge) -> None:
    with edge.client() as client:
        answer = client.get("/v1/refused?status=429")
    assert_openai_error(answer, 429, "quota_exhausted")
    assert answer.headers.get_list("x-request-id") == ["from-the-gateway"]
    assert answer.headers.get_list("retry-after") == ["77"]


@pytest.mark.parametrize("given", ["call-0001", "a" * 64, "A.b_c-123"])
def test_a_plain_request_id_is_kept(edge: Edge, given: str) -> None:
    with edge.client() as client:
        answer = client.get("/v1/x", headers={"x-request-id": given})
    assert answer.json()["headers"]["X-Request-ID"] == given
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "short", "a" * 65, 'quote"quote', "space space", "id;drop", "ünïcödé-id"])
def test_any_other_request_id_is_replaced(edge: Edge, given: str) -> None:
    with edge.client() as client:
        answer = client.get("/v1/x", headers={"x-request-id": given.encode()})
    assert ID.fullmatch(answer.json()["headers"]["X-Request-ID"])
    assert answer.headers["x-request-id"] == answer.json()["headers"]["X-Request-ID"]
    assert re.fullmatch(r"[0-9]{13}[0-9a-f]{19}", answer.headers["x-request-id"])  # sorts by time, usable as a trace id
    assert abs(int(answer.headers["x-request-id"][:13]) / 1e3 - time.time()) < 60


def test_what_a_client_says_about_its_address_counts_for_nothing(edge: Edge) -> None:
    forged = {
        "x-forwarded-for": "8.8.8.8",
        "x-real-ip": "8.8.8.8",
        "forwarded": "for=8.8.8.8",
        "x-forwarded-proto": "http",
        "x-forwarded-host": "evil.test",
        "host": "evil.test",
        "x-vllm-priority": "-100",
        "proxy": "http://evil.test",
    }
    with edge.client() as client:
        arrived = client.get("/v1/x", headers=forged).json()["headers"]
    assert arrived["X-Forwarded-For"] == "127.0.0.1"
    assert arrived["X-Forwarded-Proto"] == "https"
    assert arrived["Host"] == "gateway"
    assert not {"X-Real-IP", "Forwarded", "X-Forwarded-Host", "X-Vllm-Priority", "Proxy"} & set(arrived)
    assert "evil" not in str(arrived)


def test_what_a_caller_needs_to_send_arrives(edge: Edge) -> None:
    sent = {"authorization": "Bearer k", "x-api-key": "k", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    with edge.client() as client:
        arrived = client.get("/v1/x", headers=sent).json()["headers"]
    assert {name.lower(): value for name, value in arrived.items()}.items() >= sent.items()


def test_the_access_log_is_json_without_query_and_keys(edge: Edge) -> None:
    with edge.client() as client:
        client.post(
            '/v1/quote"and\\back?api_key=sk-in-the-query',
            headers={
                "x-request-id": "logged-call-1",
                "authorization": "Bearer sk-in-a-header",
                "x-api-key": "sk-third",
            },
            json={"prompt": "a secret prompt"},
        )
    line = edge.logged("logged-call-1")
    assert line["event"] == "edge_request"
    assert line["status"] == 200
    assert line["client"] == "127.0.0.1"
    assert line["seconds"] >= 0
    assert "?" not in line["path"]
    text = (edge.folder / "access.log").read_text() + (edge.folder / "error.log").read_text()
    for secret in ("sk-in-the-query", "sk-in-a-header", "sk-third", "secret prompt"):
        assert secret not in text


def test_hostile_text_cannot_break_a_log_line(edge: Edge) -> None:
    with edge.client() as client:
        hostile = {"x-request-id": "logged-call-2", "user-agent": '"},{"event":"forged"} \\ \t\x7f'}
        client.get("/v1/" + "long" * 500, headers=hostile)
    line = edge.logged("logged-call-2")
    assert line["event"] == "edge_request"
    assert len(line["path"]) <= 256


def test_too_many_requests_of_one_address_are_429(tmp_path: Path) -> None:
    with edge_running.edge(tmp_path, requests_per_second=1) as edge, edge.client() as client:
        answers = [client.get("/v1/x") for _ in range(8)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        for answer in refused:
            assert_openai_error(answer, 429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "1"
        assert {line["status"] for line in edge.access_log()} == {200, 429}


def test_too_many_parallel_calls_of_one_address_are_429(tmp_path: Path) -> None:
    with edge_running.edge(tmp_path, connections=2) as edge, edge.client() as client:
        endless = "/v1/stream?chunks=100000&gap=0.02"
        with edge.client() as holding, holding.stream("GET", endless), holding.stream("GET", endless):
            assert_openai_error(client.get("/v1/x"), 429, "rate_limit_exceeded")
        wait_until("places are free again", lambda: client.get("/v1/x").status_code == 200)


def test_a_forged_address_does_not_escape_the_limit(tmp_path: Path) -> None:
    with edge_running.edge(tmp_path, requests_per_second=1) as edge, edge.client() as client:
        statuses = [client.get("/v1/x", headers={"x-forwarded-for": f"10.0.0.{i}"}).status_code for i in range(8)]
    assert 429 in statuses


def test_the_status_server_tells_connections_and_the_certificates_end(edge: Edge) -> None:
    text = httpx.get(f"http://127.0.0.1:{edge.status}/metrics")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'edge_connections{state="active"} ' in text.text
    assert f"edge_certificate_not_after_timestamp_seconds {edge.settings.certificate_ends:.0f}\n" in text.text
    assert httpx.get(f"http://127.0.0.1:{edge.status}/health").json() == {"status": "ok"}
    assert httpx.get(f"http://127.0.0.1:{edge.status}/v1/models").status_code == 404


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start nginx as another user")
def test_it_runs_as_a_plain_user(tmp_path: Path) -> None:
    """As in its container: no root, no capability, a large body waits in its own folder."""
    nobody = 65534
    with edge_running.edge(tmp_path, user=nobody) as edge, edge.client() as client:
        status = Path(f"/proc/{edge.process.pid}/status").read_text()
        assert f"Uid:\t{nobody}\t{nobody}" in status
        assert "CapEff:\t0000000000000000" in status
        assert client.post("/v1/x", content=b"x" * 5_000_000).json()["body_bytes"] == 5_000_000


def test_grafana_at_the_edge_is_a_switch(tmp_path: Path) -> None:
    with (
        edge_running.upstream() as grafana,
        edge_running.edge(
            tmp_path, grafana=f"127.0.0.1:{grafana.port}", grafana_metrics=f"127.0.0.1:{grafana.port}/grafana/metrics"
        ) as edge,
        edge.client() as client,
    ):
        # Its metrics, which it shows to everybody, are for Prometheus alone.
        assert client.get("/grafana/metrics").status_code == 404
        assert httpx.get(f"http://127.0.0.1:{edge.status}/grafana-metrics").json()["path"] == "/grafana/metrics"
        arrived = client.get("/grafana/d/overview?x=1", headers={"x-forwarded-for": "8.8.8.8"}).json()
        assert arrived["path"] == "/grafana/d/overview?x=1"
        assert arrived["headers"]["X-Forwarded-For"] == "127.0.0.1"
        assert arrived["headers"]["Host"] == "127.0.0.1"
        assert client.get("/v1/x").json()["headers"]["Host"] == "gateway"


def test_no_version_is_told(edge: Edge) -> None:
    with edge.client() as client:
        assert client.get("/nothing").headers["server"] == "nginx"
