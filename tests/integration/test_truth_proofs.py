"""The promises of the ledger, proved on a running gateway: quotas under parallel clients, drops in every phase, canaries."""

import gzip
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.doubles.flow_site import metric
from tests.doubles.gateway import ADMIN_KEY, KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until


def ledger(gateway: GatewayProcess, sql: str, *parameters: Any) -> list[Any]:
    """Read the gateway's SQLite file as an outsider."""
    connection = sqlite3.connect(f"file:{gateway.folder}/gateway.sqlite3?mode=ro", uri=True, timeout=60)
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


def test_200_parallel_clients_share_a_quota_to_the_token(engine):
    """Never more than the quota is settled, most of it can be used, and the engine counted the same."""
    quota = 10_000
    with GatewayProcess(VLLM_URL=engine.url, QUEUE_CALLS=400, QUEUE_SECONDS=60) as gateway:
        before = engine.state()
        made = gateway.admin("POST", "/admin/keys", {"name": "shared", "daily_tokens": quota}).json
        told: list[dict[str, Any]] = []

        def client(number: int) -> None:
            chance = random.Random(number)
            while True:
                tokens = chance.randint(20, 120)
                answer = gateway.chat(
                    f"double:tokens={tokens}", made["secret"], stream=chance.random() < 0.5,
                    **({"max_tokens": tokens} if chance.random() < 0.7 else {}),
                )  # fmt: skip
                if answer.status == 200:
                    continue
                assert answer.status == 429, answer.body
                told.append({"code": answer.code, **answer.headers})
                if answer.code == "quota_exhausted":
                    return
                time.sleep(0.02)

        with ThreadPoolExecutor(200) as pool:
            for done in [pool.submit(client, number) for number in range(200)]:
                done.result()
        settled = ledger(gateway, "SELECT SUM(prompt_tokens + completion_tokens) FROM usage_records WHERE key_id = ?",
                         made["id"])[0][0]  # fmt: skip
        assert 9_000 <= settled <= quota
        assert gateway.get("/v1/usage", made["secret"]).json["used_tokens"] == settled
        engine.wait_idle()
        after = engine.state()
        counted = sum(after[name] - before[name] for name in ("prompt_tokens", "generation_tokens"))
        assert counted == settled
        for refusal in told:
            assert int(refusal["retry-after"]) >= 1
            assert (refusal.get("x-should-retry") == "false") == (refusal["code"] == "quota_exhausted")
        assert ledger(gateway, "SELECT COUNT(*) FROM holds") == [(0,)]


def test_a_refused_call_takes_nothing_over_http(engine):
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        made = gateway.admin("POST", "/admin/keys", {"name": "one", "requests_per_minute": 2, "concurrency": 1}).json
        opened = threading.Event()

        def slow() -> int:
            opened.set()
            return gateway.chat("double:tokens=60,wait_after=9", made["secret"], max_tokens=60, stream=True).status

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(slow)
            assert opened.wait(60)
            wait_until("the slow call stands still", lambda: engine.requests()[-1]["events"] == 9)
            for _ in range(5):
                refused = gateway.chat(key=made["secret"])
                assert refused.code == "concurrency_exceeded"
                assert refused.headers["x-ratelimit-remaining-requests"] == "1"
            engine.go_on()
            assert running.result() == 200
        assert gateway.chat(key=made["secret"], max_tokens=2).status == 200
        refused = gateway.chat(key=made["secret"], max_tokens=2)
        assert refused.code == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A trace collector on a free port: its URL, and the bodies that it gets."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            bodies.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()


def test_a_canary_key_appears_nowhere(engine):
    """A secret that is sent in every header, body and URL position is in no log, trace, metric, error or database file."""
    canary = "sk-gw-CANARY0123456789abcdefCANARY"
    with (
        collector() as (collector_url, spans),
        GatewayProcess(
            VLLM_URL=engine.url, LOG_LEVEL="DEBUG", TRACE_RATIO=1, OTEL_EXPORTER_OTLP_ENDPOINT=collector_url
        ) as gateway,
    ):
        chat = {"model": "double", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        answers = [
            gateway.request("POST", "/v1/chat/completions", body, key, **headers)
            for body, key, headers in [
                (chat, canary, {}),
                (chat, KEY, {"x-api-key": canary}),
                (chat, None, {"x-api-key": canary}),
                (chat, KEY, {"x-request-id": canary[:4] + "!" + canary}),
                (chat, KEY, {"traceparent": f"00-{canary}-00f067aa0ba902b7-01", "tracestate": canary}),
                (chat, KEY, {"user-agent": canary, "cookie": canary, "x-forwarded-for": canary, "referer": canary}),
                (chat, None, {"authorization": f"Basic {canary}"}),
                (chat, None, {"authorization": canary}),
                ({**chat, "model": canary}, KEY, {}),
                ({**chat, "messages": [{"role": "user", "content": canary}]}, KEY, {}),
                ({**chat, "user": canary, "metadata": {"k": canary}}, KEY, {}),
                ({**chat, "n": canary}, KEY, {}),
                ({**chat, canary: 1}, KEY, {}),
                (canary.encode(), KEY, {}),
                ({**chat, "max_tokens": canary}, KEY, {}),
            ]
        ]
        answers += [
            gateway.get(f"/{canary}"), gateway.get(f"/v1/models/{canary}"), gateway.get(f"/v1/usage?key={canary}"),
            gateway.get(f"/v1/usage?key={canary}", canary), gateway.get("/admin/keys", canary),
            gateway.post(f"/v1/chat/completions?api_key={canary}", chat),
            gateway.admin("GET", f"/admin/keys/{canary}"), gateway.admin("GET", f"/admin/usage?from={canary}"),
            gateway.admin("POST", "/admin/keys", {"name": "x", canary: 1}),
            gateway.admin("POST", "/admin/keys", {"name": "x", "priority": canary}),
            gateway.get("/metrics"), gateway.get("/ready"),
        ]  # fmt: skip
        wait_until("records are written", lambda: ledger(gateway, "SELECT COUNT(*) FROM usage_records")[0][0] >= 8)
        assert gateway.terminate() == 0
        echoed = [a for a in answers if a.status >= 400 and canary.encode() in a.body]
        # A name that does not exist is told to the one who asked for it, in the answer alone.
        assert all(a.code in ("unknown_route", "model_not_found", "invalid_request") for a in echoed)
        assert not any(canary.encode() in a.body for a in answers[:8])
        assert b"gen_ai.request.model" in b"".join(spans), "traces were sent"
        assert canary.encode() not in b"".join(spans)
        for line in gateway.raw:
            assert canary.encode() not in line
        for path in gateway.folder.rglob("*"):
            if path.is_file():
                assert canary.encode() not in path.read_bytes(), path
        assert canary.encode() not in answers[-2].body


def test_every_route_needs_its_key_and_says_so_at_once(engine):
    """Walked from the route table: without a key, with wrong, disabled, expired and foreign keys."""
    from gateway.wire import ENDPOINTS

    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        disabled = gateway.admin("POST", "/admin/keys", {"name": "d"}).json
        gateway.admin("POST", f"/admin/keys/{disabled['id']}/disable")
        expired = gateway.admin("POST", "/admin/keys", {"name": "e", "expires_at": time.time() + 0.2}).json
        deleted = gateway.admin("POST", "/admin/keys", {"name": "x"}).json
        gateway.admin("DELETE", f"/admin/keys/{deleted['id']}")
        wait_until("the key expires", lambda: gateway.get("/v1/usage", expired["secret"]).status == 403)
        routes = [("POST", path) for path in ENDPOINTS] + [
            ("GET", "/v1/models"),
            ("GET", "/v1/models/double"),
            ("GET", "/v1/usage"),
        ]
        wrong = {
            None: (401, "missing_api_key"),
            "sk-nobody-0123456789": (401, "invalid_api_key"),
            ADMIN_KEY: (401, "invalid_api_key"),
            deleted["secret"]: (401, "invalid_api_key"),
            disabled["secret"]: (403, "key_disabled"),
            expired["secret"]: (403, "key_expired"),
        }
        for method, path in routes:
            for key, (status, code) in wrong.items():
                answer = gateway.request(method, path, {"model": "double"} if method == "POST" else None, key)
                assert (answer.status, _code(answer, path)) == (status, code), (method, path, key)
        admin = [
            ("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/keys/x"), ("PATCH", "/admin/keys/x"),
            ("DELETE", "/admin/keys/x"), ("POST", "/admin/keys/x/rotate"), ("POST", "/admin/keys/x/disable"),
            ("POST", "/admin/keys/x/enable"), ("GET", "/admin/usage"), ("GET", "/admin/queue"), ("GET", "/admin/audit"),
            ("GET", "/admin/organisations"), ("PATCH", "/admin/organisations/x"),
        ]  # fmt: skip
        for method, path in admin:
            for key in (None, KEY, disabled["secret"], "wrong-admin-key"):
                assert gateway.request(method, path, {} if method != "GET" else None, key).status == 401, (method, path)
        assert ledger(gateway, "SELECT COUNT(*) FROM usage_records WHERE prompt_tokens > 0") == [(0,)]


def _code(answer: Any, path: str) -> str:
    error = answer.json["error"]
    return error.get("code") or {"authentication_error": "", "permission_error": ""}.get(error["type"], error["type"])


def test_a_stream_ends_at_the_keys_last_token_with_a_valid_end(engine):
    """No max_tokens, an answer without end, a day that is nearly used up: the client gets a regular end."""
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        made = gateway.admin("POST", "/admin/keys", {"name": "small", "daily_tokens": 1200}).json
        answer = gateway.chat("double:tokens=100000", made["secret"], stream=True)
        assert answer.status == 200
        assert answer.headers["x-ratelimit-limit-tokens"] == "1200"
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in answer.body.replace(b": ", b":")
        assert b'"error"' not in answer.body
        usage = gateway.get("/v1/usage", made["secret"]).json
        assert 900 < usage["used_tokens"] <= 1200
        refused = gateway.chat("double:tokens=100000", made["secret"], stream=True)
        assert (refused.status, refused.code) == (429, "quota_exhausted")
        assert int(refused.headers["retry-after"]) <= 86_400


def test_a_second_gateway_on_the_same_database_ends_with_one_line(engine):
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        second = gateway.cli("serve")
        assert second.returncode == 2
        assert "another gateway" in second.stdout + second.stderr
        assert "Traceback" not in second.stdout + second.stderr
        assert gateway.chat(max_tokens=2).status == 200


def ledger_state(gateway: GatewayProcess) -> tuple[float, float]:
    """What the metrics say: whether it can be written, and how often it could not."""
    return metric(gateway, "gateway_ledger_up"), metric(gateway, "gateway_ledger_failures_total")


def test_while_the_database_refuses_callers_are_told_503_and_it_heals_by_itself(engine):
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        stream: list[Any] = []
        answered: list[int] = []

        def chat() -> Any:
            answer = gateway.chat(max_tokens=2)
            if answer.status == 200:
                answered.append(1)
            return answer

        def run() -> None:
            stream.append(gateway.chat("double:tokens=60,pace_ms=50", stream=True, max_tokens=60))

        caller = threading.Thread(target=run)
        caller.start()
        wait_until("it streams", lambda: engine.state()["running"] == 1)
        assert ledger_state(gateway) == (1, 0)
        lock = sqlite3.connect(f"{gateway.folder}/gateway.sqlite3", isolation_level=None, timeout=60)
        lock.execute("BEGIN IMMEDIATE")
        try:
            # Nobody knows that the database refuses until there is something to write; that is safe in the spool.
            refused = wait_until("a refusal", lambda: answer if (answer := chat()).status != 200 else None)
            assert (refused.status, refused.code) == (503, "ledger_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            assert gateway.get("/ready").status == 503
            _, failures = ledger_state(gateway)
            assert failures >= 1
            wait_until("each attempt that fails counts", lambda: ledger_state(gateway)[1] > failures)
            assert gateway.get("/v1/models").status == 200  # keys are served from memory, never 401
            caller.join(60)
            assert stream[0].body.endswith(b"data: [DONE]\n\n")  # its usage is safe in the spool
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        wait_until("it heals", lambda: gateway.get("/ready").status == 200)
        assert ledger_state(gateway)[0] == 1
        assert chat().status == 200
        wait_until(
            "the spool is replayed",
            lambda: (
                ledger(gateway, "SELECT completion_tokens FROM usage_records WHERE outcome = 'ok' AND stream = 1")
                == [(60,)]
            ),
        )
        ended = len(answered) + 1  # the stream too
        counted = "SELECT COUNT(*) FROM usage_records WHERE outcome = 'ok'"
        wait_until("all are recorded", lambda: ledger(gateway, counted)[0][0] >= ended)
        assert ledger(gateway, counted) == [(ended,)]
        wait_until("no hold is left", lambda: ledger(gateway, "SELECT COUNT(*) FROM holds") == [(0,)])


def test_the_drift_against_the_engine_is_zero_when_all_is_settled(engine):
    def drift() -> float | None:
        for line in gateway.get("/metrics").body.decode().splitlines():
            if line.startswith("gateway_ledger_drift_tokens "):
                return float(line.split()[1])
        return None

    with VllmDouble(model="double") as own, GatewayProcess(VLLM_URL=own.url) as gateway:
        for number in range(20):
            gateway.chat(f"double:tokens={number + 1}", stream=number % 2 == 0, max_tokens=50)
        wait_until("the drift is zero", lambda: drift() == 0)
