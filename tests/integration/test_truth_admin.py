"""Keys, organisations and usage from outside: over HTTP and on the command line, on a running gateway."""

import json
import socket
import sqlite3
import threading
import time

import pytest
from tests.doubles.gateway import ADMIN_KEY, KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

LIMITS = ["requests_per_minute", "tokens_per_minute", "concurrency", "daily_tokens", "max_tokens"]


def create(gateway: GatewayProcess, **fields: object) -> dict:
    answer = gateway.admin("POST", "/admin/keys", {"name": "made", **fields})
    assert answer.status == 201, answer.body
    return answer.json


class Stream(threading.Thread):
    """A streaming call on a connection of its own; `text` grows as bytes arrive."""

    def __init__(self, gateway: GatewayProcess, key: str, prompt: str) -> None:
        super().__init__(daemon=True)
        body = json.dumps(
            {"model": "double", "stream": True, "messages": [{"role": "user", "content": prompt}]}
        ).encode()
        self.socket = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.socket.sendall(head.encode() + body)
        self.text = b""
        self.ended_at = 0.0
        self.start()

    def run(self) -> None:
        while data := self.socket.recv(65536):
            self.text += data
        self.ended_at = time.monotonic()
        self.socket.close()

    @property
    def request_id(self) -> str:
        head = self.text.partition(b"\r\n\r\n")[0].lower().decode()
        return next(line.split(": ", 1)[1] for line in head.split("\r\n") if line.startswith("x-request-id"))


def test_a_keys_life_over_http(gateway):
    made = create(gateway, daily_tokens=1000, concurrency=0, models=["double"], organisation="lab", priority="low")
    assert made["daily_tokens"] == 1000
    assert made["concurrency"] == 0
    assert made["requests_per_minute"] is None
    assert set(made) >= {"id", "name", "secret", *LIMITS, "models", "priority", "weight", "expires_at", "organisation"}
    path = f"/admin/keys/{made['id']}"
    assert gateway.chat(key=made["secret"], max_tokens=5).status == 200
    listed = gateway.admin("GET", "/admin/keys").json["data"]
    assert [key["name"] for key in listed if key["id"] == made["id"]] == ["made"]
    assert "secret" not in json.dumps(listed)
    changed = gateway.admin("PATCH", path, {"daily_tokens": None, "weight": 3})
    assert (changed.status, changed.json["daily_tokens"], changed.json["weight"]) == (200, None, 3)
    assert gateway.admin("GET", path).json["weight"] == 3
    rotated = gateway.admin("POST", f"{path}/rotate", {"grace_seconds": 60}).json
    assert set(rotated) == {"id", "secret"}
    assert gateway.chat(key=made["secret"], max_tokens=5).status == 200
    assert gateway.chat(key=rotated["secret"], max_tokens=5).status == 200
    newest = gateway.admin("POST", f"{path}/rotate").json["secret"]
    assert gateway.chat(key=rotated["secret"]).code == "invalid_api_key"
    assert gateway.admin("POST", f"{path}/disable").json["disabled"] is True
    refused = gateway.chat(key=newest)
    assert (refused.status, refused.code) == (403, "key_disabled")
    assert gateway.admin("POST", f"{path}/enable").json["disabled"] is False
    assert gateway.chat(key=newest, max_tokens=5).status == 200
    deleted = gateway.admin("DELETE", path)
    assert (deleted.status, deleted.body) == (204, b"")
    assert not {"content-length", "content-type"} & set(deleted.headers)
    assert gateway.chat(key=newest).code == "invalid_api_key"
    assert gateway.admin("GET", path).status == 404
    assert gateway.admin("DELETE", path).code == "key_not_found"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "daily_token": 5},
        {"name": "x", "disabled": True},
        {},
        {"name": "x", "daily_tokens": -1},
        b"{",
        b"[]",
    ],
)
def test_what_is_unknown_or_wrong_is_refused(gateway, body):
    answer = gateway.admin("POST", "/admin/keys", body)
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_unknown_fields_are_refused_everywhere(gateway):
    key_id = create(gateway)["id"]
    for method, path, body in (
        ("PATCH", f"/admin/keys/{key_id}", {"weigth": 2}),
        ("POST", f"/admin/keys/{key_id}/rotate", {"grace": 2}),
        ("PATCH", "/admin/organisations/lab", {"tokens": 2}),
    ):
        assert gateway.admin(method, path, body).status == 400
    assert gateway.admin("GET", "/admin/usage?group=key").status == 400
    assert gateway.admin("GET", "/admin/usage?group_by=secret").status == 400
    assert gateway.admin("GET", "/admin/usage?from=yesterday").status == 400


def test_the_admin_api_takes_only_the_admin_key(gateway):
    for key in (None, KEY, ADMIN_KEY + "x", ADMIN_KEY[:-1], ""):
        for method, path in (
            ("GET", "/admin/keys"),
            ("POST", "/admin/keys"),
            ("GET", "/admin/usage"),
            ("GET", "/admin/queue"),
        ):
            answer = gateway.request(method, path, {"name": "x"} if method == "POST" else None, key)
            assert answer.status == 401, (key, path)
            assert answer.code in ("missing_api_key", "invalid_api_key")
    assert gateway.chat(key=ADMIN_KEY).status == 401  # and it opens nothing else


def test_addresses_outside_the_networks_are_turned_away(engine):
    with GatewayProcess(VLLM_URL=engine.url, ADMIN_NETWORKS="192.0.2.0/24") as gateway:
        assert gateway.admin("GET", "/admin/keys").status == 403
        allowed = gateway.get("/admin/keys", ADMIN_KEY, X_Forwarded_For="192.0.2.7")
        assert allowed.status == 200
        assert gateway.chat(max_tokens=5).status == 200


def test_without_an_admin_key_it_is_closed(engine):
    with GatewayProcess(VLLM_URL=engine.url, GATEWAY_ADMIN_KEY=None) as gateway:
        assert gateway.admin("GET", "/admin/keys").status == 401
        assert gateway.get("/admin/keys", "\0" * 8).status in (400, 401)


def test_own_usage(gateway):
    made = create(gateway, daily_tokens=5000)
    empty = gateway.get("/v1/usage", made["secret"])
    assert empty.status == 200
    assert empty.json["key_id"] == made["id"]
    assert (empty.json["used_tokens"], empty.json["held_tokens"], empty.json["requests"]) == (0, 0, 0)
    assert (empty.json["limit_tokens"], empty.json["remaining_tokens"]) == (5000, 5000)
    assert time.time() < empty.json["resets_at"] <= time.time() + 86_400
    spent = gateway.chat(key=made["secret"], max_tokens=7).json["usage"]["total_tokens"]
    after = gateway.get("/v1/usage", made["secret"]).json
    assert (after["used_tokens"], after["remaining_tokens"], after["requests"]) == (spent, 5000 - spent, 1)
    unlimited = gateway.get("/v1/usage").json
    assert unlimited["limit_tokens"] is None
    assert unlimited["remaining_tokens"] is None
    assert gateway.get("/v1/usage", None).code == "missing_api_key"
    assert gateway.get("/v1/usage", "sk-nobody-000").code == "invalid_api_key"


def test_usage_of_all_over_http_and_on_the_command_line(gateway):
    made = create(gateway, organisation="readers")
    spent = [gateway.chat(key=made["secret"], max_tokens=n).json["usage"] for n in (3, 5)]
    prompt, completion = (sum(u[name] for u in spent) for name in ("prompt_tokens", "completion_tokens"))
    for group, column, name in (("key", "key_id", made["id"]), ("organisation", "organisation", "readers")):
        data = gateway.admin("GET", f"/admin/usage?group_by={group}").json["data"]
        row = next(row for row in data if row[column] == name)
        assert (row["prompt_tokens"], row["completion_tokens"], row["requests"]) == (prompt, completion, 2)
    by_model = gateway.admin("GET", "/admin/usage?group_by=model").json["data"]
    assert "double" in {row["model"] for row in by_model}
    day = gateway.get("/v1/usage").json["day"]
    assert [
        row["day"] for row in gateway.admin("GET", f"/admin/usage?group_by=day&from={day}&to={day}").json["data"]
    ] == [day]
    assert gateway.admin("GET", "/admin/usage?group_by=day&to=2020-01-01").json["data"] == []
    told = gateway.cli("usage", "--by", "model", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["data"] == by_model


def test_a_key_is_shown_alike_over_http_and_on_the_command_line(gateway):
    gateway.admin("PATCH", "/admin/organisations/shown", {"daily_tokens": 9000})
    made = create(gateway, daily_tokens=5000, organisation="shown")
    spent = gateway.chat(key=made["secret"], max_tokens=7).json["usage"]["total_tokens"]
    over_http = gateway.admin("GET", f"/admin/keys/{made['id']}").json
    told = gateway.cli("keys", "show", made["id"], "--json")
    assert told.returncode == 0, told.stderr
    shown = json.loads(told.stdout)
    for usage in (over_http["usage"], over_http["usage"]["organisation"]):
        assert usage["held_tokens"] == 0
        usage["held_tokens"] = None  # only the gateway knows what is held
    assert shown == over_http
    assert shown["usage"]["used_tokens"] == spent
    assert shown["usage"]["remaining_tokens"] == 5000 - spent
    assert shown["usage"]["organisation"]["remaining_tokens"] == 9000 - spent
    lines = gateway.cli("keys", "show", made["id"]).stdout.splitlines()
    assert ["usage", "used_tokens", str(spent)] in [line.split() for line in lines]


def test_an_organisations_quota_over_http(gateway):
    changed = gateway.admin("PATCH", "/admin/organisations/club", {"daily_tokens": 2000})
    assert (changed.status, changed.json["daily_tokens"]) == (200, 2000)
    one, two = (create(gateway, organisation="club") for _ in range(2))
    gateway.chat(key=one["secret"], text="double:tokens=300", max_tokens=300)
    refused = None
    for _ in range(10):
        refused = gateway.chat(key=two["secret"], text="double:tokens=300", max_tokens=300)
        if refused.status != 200:
            break
    assert refused.code == "quota_exhausted"
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) > 0
    usage = gateway.get("/v1/usage", two["secret"]).json["organisation"]
    assert usage["limit_tokens"] == 2000
    assert 1600 < usage["used_tokens"] <= 2000
    assert (
        next(o for o in gateway.admin("GET", "/admin/organisations").json["data"] if o["name"] == "club")["keys"] == 2
    )


def test_a_change_on_the_command_line_is_noticed_at_once(gateway):
    told = gateway.cli("keys", "create", "--name", "cli", "--json")
    assert told.returncode == 0, told.stderr
    made = json.loads(told.stdout)
    wait_until("the new key works", lambda: gateway.get("/v1/models", made["secret"]).status == 200)
    assert gateway.cli("keys", "disable", made["id"]).returncode == 0
    wait_until("the key is refused", lambda: gateway.get("/v1/models", made["secret"]).status == 403)


@pytest.mark.parametrize("by", ["http", "cli", "rotation", "deletion"])
def test_revoking_a_key_ends_its_streams_within_a_second(gateway, engine, by):
    others = Stream(gateway, KEY, "double:tokens=150,wait_after=20")
    seconds = [revoke(gateway, engine, by)]
    while min(seconds) >= 1.0 and len(seconds) < 3:  # a machine that is busy otherwise gets another chance
        seconds.append(revoke(gateway, engine, by))
    assert min(seconds) < 1.0, seconds
    engine.go_on()
    others.join(60)
    assert b"[DONE]" in others.text  # nobody else was touched


def revoke(gateway: GatewayProcess, engine: VllmDouble, by: str) -> float:
    """Revoke a key with ten streams; returns the seconds until the last one had its proper end."""
    made = create(gateway)
    streams = [Stream(gateway, made["secret"], "double:tokens=4000,pace_ms=20") for _ in range(10)]
    wait_until("tokens flow", lambda: all(s.text.count(b"data: ") > 5 for s in streams))
    if by == "http":
        gateway.admin("POST", f"/admin/keys/{made['id']}/disable")
    elif by == "rotation":
        gateway.admin("POST", f"/admin/keys/{made['id']}/rotate", {"grace_seconds": 0})
    elif by == "deletion":
        gateway.admin("DELETE", f"/admin/keys/{made['id']}")
    else:
        assert gateway.cli("keys", "disable", made["id"]).returncode == 0
    revoked_at = time.monotonic()
    for stream in streams:
        stream.join(60)
        assert stream.text.count(b'"error"') == 1
        assert b"[DONE]" not in stream.text
        assert gateway.closed(stream.request_id)["outcome"] == "revoked"
    wait_until("the engine is idle for them", lambda: engine.state()["running"] <= 1)

    def recorded() -> dict | None:
        rows = [row for row in gateway.admin("GET", "/admin/usage").json["data"] if row["key_id"] == made["id"]]
        return rows[0] if rows and rows[0]["requests"] >= 10 else None

    usage = wait_until("all are recorded", recorded)
    assert usage["requests"] == 10
    by_id = {r["request_id"]: r for r in engine.requests()}
    relayed = sum(s.text.count(b'"content":"') - s.text.count(b'"content":""') for s in streams)
    counted = sum(by_id[s.request_id]["completion_tokens"] for s in streams)
    assert relayed <= usage["completion_tokens"] <= counted
    return max(stream.ended_at for stream in streams) - revoked_at


def test_a_key_that_ends_while_its_answer_is_being_recorded_is_told_so(engine):
    """The record waits for the database, the key expires meanwhile: an honest refusal, never an answer without a cause."""
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        ends = time.time() + 1.5
        made = gateway.admin("POST", "/admin/keys", {"name": "short", "expires_at": ends}).json
        lock = sqlite3.connect(f"{gateway.folder}/gateway.sqlite3", isolation_level=None, timeout=60)
        lock.execute("BEGIN IMMEDIATE")
        try:
            answer = gateway.chat("double:tokens=3", made["secret"], max_tokens=3)
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        assert (answer.status, answer.code) == (403, "key_expired")
