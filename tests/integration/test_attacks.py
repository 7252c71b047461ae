"""What broke other gateways, tried on ours from outside: keys as SQL, routes in disguise, upstreams named by the caller."""

import json
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.doubles.gateway import ADMIN_KEY, KEY, GatewayProcess
from tests.doubles.vllm import VllmDouble

HOSTILE_KEYS = [
    "' OR '1'='1",
    "'; DROP TABLE keys; --",
    '" UNION SELECT digest FROM key_secrets --',
    f"{KEY}' --",
    f"{KEY}\u00a0",
    f"{KEY},{KEY}",
    "%s%s%s%n",
    "{{7*7}}",
    "../../etc/passwd",
    "\u00ff\u00fe",
    "None",
    "null",
    "x" * 4000,
]


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(model="double", api_key="k-engine") as engine:
        yield engine


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY="k-engine") as gateway:
        yield gateway


def raw(gateway: GatewayProcess, request: bytes) -> tuple[int, bytes]:
    """One request, byte for byte; status and the whole answer."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return int(answer.split(None, 2)[1]), answer


def tables(gateway: GatewayProcess) -> list[Any]:
    with sqlite3.connect(f"file:{gateway.folder}/gateway.sqlite3?mode=ro", uri=True, timeout=60) as connection:
        return connection.execute(
            "SELECT (SELECT COUNT(*) FROM keys), (SELECT COUNT(*) FROM key_secrets), (SELECT COUNT(*) FROM sqlite_master)"
        ).fetchall()


@pytest.mark.parametrize("key", HOSTILE_KEYS, ids=range(len(HOSTILE_KEYS)))
def test_a_key_is_never_more_than_a_wrong_key(gateway, key):
    before, sent = tables(gateway), key.encode("latin-1")
    for head in (b"authorization: Bearer " + sent, b"x-api-key: " + sent):
        for method, path in ((b"POST", b"/v1/chat/completions"), (b"GET", b"/v1/models"), (b"GET", b"/v1/usage")):
            body = b"{}" if method == b"POST" else b""
            status, answer = raw(
                gateway,
                method + b" " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" + head
                + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body,
            )  # fmt: skip
            assert status == 401, answer[:300]
            assert len(sent) < 6 or sent not in answer
    assert gateway.request("GET", "/admin/keys", None, None, authorization=f"Bearer {key}").status == 401
    assert tables(gateway) == before
    assert not any(sent in line for line in gateway.raw if len(sent) > 6)


DISGUISES = [
    "//v1/usage", "/v1//usage", "/./v1/usage", "/health/../v1/usage", "/health/..%2fv1/usage", "/v1/%75sage",
    "/V1/USAGE", "/v1/usage/", "/v1/usage;x=1", "/v1/usage%00", "/v1/usage%20", "/v1/models/../usage", "/admin/keys/",
    "/admin//keys", "/%61dmin/keys", "/health/../admin/keys", "/admin/keys%2f", "/admin/keys;a=b", "/ADMIN/keys",
]  # fmt: skip
LIES = [
    "host: x/health?", "host: x/health#", "host: 127.0.0.1:8080/metrics?", "x-original-url: /health",
    "x-rewrite-url: /health", "x-forwarded-prefix: /health", "x-forwarded-host: x/health?", "x-http-method-override: GET",
    "x-forwarded-for: 127.0.0.1", "x-real-ip: 127.0.0.1", "forwarded: for=127.0.0.1;host=x/health",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/models", "/admin/keys", "/admin/audit", *DISGUISES])
def test_no_disguise_of_a_path_or_a_host_opens_a_route(gateway, path):
    """What decides who may call is bound to the handler, never to a path put together from what the caller sent."""
    for lie in ("host: x", *LIES):
        head = lie if lie.startswith("host") else f"host: x\r\n{lie}"
        for target in (path, f"http://x/health/..{path}"):
            status, answer = raw(gateway, f"GET {target} HTTP/1.1\r\n{head}\r\nconnection: close\r\n\r\n".encode())
            assert status in (400, 401, 403, 404, 405), (target, lie, answer[:300])
            assert b'"data"' not in answer, (target, lie)
            assert b"used_tokens" not in answer, (target, lie)


def test_nothing_in_a_call_names_the_upstream(gateway, engine):
    """A listening trap stands for the address an attacker names, in every place other gateways have looked for one."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.05)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/v1"
        named = {
            "api_base": url, "base_url": url, "api_key": "sk-mine", "custom_llm_provider": "openai", "url": url,
            "endpoint": url, "proxy": url, "user_config": {"model_list": [{"api_base": url}]},
            "extra_body": {"api_base": url}, "metadata": {"base_url": url}, "fallbacks": [{"api_base": url}],
        }  # fmt: skip
        heads = dict.fromkeys(("x_portkey_custom_host", "x_api_base", "x_base_url", "x_upstream", "x_forwarded_host", "x_target_url", "helicone_target_url", "x_envoy_original_dst_host", "cf_aig_custom", "origin", "referer"), url)  # fmt: skip
        before = len(engine.requests())
        body = {"model": "double", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
        for fields in (*({name: value} for name, value in named.items()), named):
            answer = gateway.post("/v1/chat/completions", {**body, **fields}, **heads)
            assert answer.status in (200, 400), answer.body
        for key_id in (url, "http:%2f%2f127.0.0.1", "..%2f..%2fadmin"):
            gateway.get(f"/v1/models/{key_id}")
        with pytest.raises(TimeoutError):
            trap.accept()
        calls = engine.requests()[before:]
        assert calls, "no call reached the engine: nothing was tried"
        for call in calls:
            assert call["headers"]["authorization"] == "Bearer k-engine"
            assert not {name for name in call["headers"] if name.startswith(("x-portkey", "x-upstream", "helicone"))}


REMOTE = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
AROUND = {
    "score items": ("/v1/score", {"queries": "x", "items": [{"content": REMOTE}]}),
    "batched conversations": ("/v1/embeddings", {"messages": [[{"role": "user", "content": REMOTE}]]}),
    "a field of tomorrow": ("/v1/chat/completions", {"messages": [], "attached": [{"content": REMOTE}]}),
    "tool arguments, not Anthropic's": (
        "/v1/chat/completions", {"messages": [{"role": "user", "type": "tool_use", "input": REMOTE, "content": "x"}]},
    ),
    "beside tool arguments": (
        "/v1/messages",
        {"max_tokens": 2, "messages": [{"role": "user", "content": [
            {"type": "tool_use", "id": "t", "name": "t", "input": {}, "source": {"type": "url", "url": "http://h/x"}},
        ]}]},
    ),
    "documents to rank": ("/v1/rerank", {"query": "x", "documents": [{"content": REMOTE}]}),
    "5,000 items": ("/v1/score", {"queries": "x", "items": ["y"] * 5_000}),
    "5,000 conversations": ("/v1/embeddings", {"messages": [[{"role": "user", "content": "x"}]] * 5_000}),
}  # fmt: skip


@pytest.mark.parametrize("place", AROUND)
def test_no_field_leads_around_the_checks_of_media_and_prompts(gateway, engine, place):
    path, fields = AROUND[place]
    before = len(engine.requests())

    answer = gateway.post(path, {"model": "double", **fields})

    assert answer.status == 400, answer.body
    assert len(engine.requests()) == before


def test_a_caller_makes_no_key_and_a_key_gets_no_right_by_asking(gateway):
    """Rights are a fixed list of fields, set by who has the admin key alone."""
    for field in ("role", "user_role", "allowed_routes", "is_admin", "secret", "id", "digest", "origin", "permissions"):
        refused = gateway.admin("POST", "/admin/keys", {"name": "x", field: "admin"})
        assert (refused.status, refused.code) == (400, "invalid_request"), field
    made = gateway.admin("POST", "/admin/keys", {"name": "x"}).json
    for method, path in (("POST", "/admin/keys"), ("PATCH", f"/admin/keys/{made['id']}"), ("GET", "/admin/keys")):
        body = None if method == "GET" else {"name": "y"}
        assert gateway.request(method, path, body, made["secret"]).status == 401
    assert gateway.get("/v1/models", ADMIN_KEY).status == 401  # nor does the admin key make calls


def test_numbers_that_would_stop_the_engine_never_reach_it(gateway, engine):
    before = len(engine.requests())
    body = {"model": "double", "messages": [{"role": "user", "content": "x"}]}
    for fields in (
        {"n": 10**6}, {"n": -1}, {"n": 2.5}, {"n": 10**30}, {"top_logprobs": 10**6, "logprobs": True},
        {"max_tokens": -1}, {"max_tokens": "9" * 400},
    ):  # fmt: skip
        answer = gateway.post("/v1/chat/completions", {**body, **fields})
        assert answer.status == 400, (fields, answer.body)
    answer = gateway.post("/v1/completions", {"model": "double", "prompt": ["x"] * 10_000, "max_tokens": 1})
    assert answer.status == 400, answer.body
    nested = b'{"model":"double","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert gateway.post("/v1/chat/completions", nested).status == 400
    remote = [{"type": "image_url", "image_url": {"url": "http:\\\\169.254.169.254/latest"}}]
    media = {"model": "double", "messages": [{"role": "user", "content": remote}]}
    assert gateway.post("/v1/chat/completions", media).status == 400
    for name in ("documents", "items", "data_2", "text_2"):
        pairs = {"model": "double", "queries": "x", "text_1": "x", "data_1": "x", name: [{"content": remote}]}
        assert gateway.post("/v1/score", pairs).status == 400, name
    reached = engine.requests()[before:]
    assert not reached, [call["body"][:200] for call in reached]
    # The engine itself judges a length; but a number of no database may break what counts it.
    limited = gateway.admin(
        "POST", "/admin/keys", {"name": "x", "daily_tokens": 9_000, "tokens_per_minute": 9_000}
    ).json
    for huge in (2**31, 2**63, 10**30):
        for key in (KEY, limited["secret"]):
            answer = gateway.chat(key=key, max_tokens=huge)
            assert answer.status in (200, 400, 429), answer.body
    assert gateway.get("/ready").status == 200
    assert gateway.chat(max_tokens=2).status == 200


def test_one_call_that_breaks_its_connection_takes_the_engine_from_nobody(engine):
    """Tried again, it fails again; that is one failure of the engine, and not enough to open its breaker."""
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY="k-engine", BREAKER_FAILURES=3) as gateway:
        before = len(engine.requests())
        broken = gateway.chat("double:die=headers", max_tokens=2)
        assert (broken.status, broken.code) == (502, "upstream_error")
        assert 1 <= len(engine.requests()) - before <= 3
        assert gateway.chat(max_tokens=2).status == 200
        for _ in range(3):
            gateway.chat("double:die=headers", max_tokens=2)
        assert gateway.get("/ready").status == 503  # three calls in a row are another matter


def test_no_package_of_ours_runs_code_at_every_start_of_python():
    """A `.pth` file with an `import` line runs whenever Python starts; an attacked package came with one."""
    allowed = {"distutils-precedence.pth"}  # setuptools' own; the services' images have no setuptools
    site = next(Path(path) for path in __import__("sys").path if path.endswith("site-packages"))
    found = {
        path.name
        for path in site.glob("*.pth")
        if any(line.startswith("import ") for line in path.read_text().splitlines())
    }
    assert found <= allowed, found - allowed


def test_the_log_of_all_this_is_whole(gateway):
    """Every line that the attempts above have left is one JSON object and names no key."""
    for line in gateway.raw:
        json.loads(line)
        assert KEY.encode() not in line
        assert ADMIN_KEY.encode() not in line
