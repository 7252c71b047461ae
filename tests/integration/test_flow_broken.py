"""An engine that dies, hangs or lies at any point: one true ending for the caller, one true record in the ledger."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.doubles.edge_running import NGINX
from tests.doubles.flow_site import PATHS, Wire, asking, at_rest, body_of, edge_before, ledger, metric
from tests.doubles.gateway import GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble, wait_until
from tests.doubles.vllm_directive import SECRET

TOKENS = 6
_numbers = itertools.count()
# Events of a whole stream of TOKENS tokens, so the last place in which it can break.
EVENTS = {"chat": TOKENS + 3, "completions": TOKENS + 2, "responses": TOKENS + 7, "messages": TOKENS + 4}
LIES = ["die_after={k}", "die_after={k},how=rst", "die_after={k},how=clean", "garbage_after={k}", "hang_after={k}"]


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    # Every call here fails on purpose: the breaker, proved elsewhere, must not answer for the engine.
    with GatewayProcess(
        VLLM_URL=engine.url,
        BREAKER_FAILURES=100_000,
        IDLE_SECONDS=0.4,
        FIRST_BYTE_SECONDS=0.4,
        KEEP_ALIVE_SECONDS=0,
        RETRY_RATIO=0,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def edge(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if NGINX is None:
        pytest.skip("nginx is not installed on this machine")
    with edge_before(gateway, tmp_path_factory.mktemp("edge")) as running:
        yield running


def events_of(body: bytes) -> list[tuple[str, str]]:
    """(name, data) of each event; the body must end at the end of one."""
    assert body.endswith(b"\n\n"), body[-100:]
    found = []
    for block in body.decode().strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields.get("event", ""), fields["data"]))
    return found


def is_error(what: str, name: str, data: str) -> bool:
    """Whether this is the dialect's error event."""
    if what in ("chat", "completions"):
        return data != "[DONE]" and "error" in json.loads(data)
    parsed = json.loads(data)
    if what == "messages":
        return name == "error" and parsed["type"] == "error" and bool(parsed["error"]["message"])
    return name == "response.failed" and parsed["response"]["status"] == "failed"


def is_clean_end(name: str, data: str) -> bool:
    return data == "[DONE]" or name in ("message_stop", "response.completed")


def check_broken(what: str, raw: bytes, outcome: dict[str, Any]) -> int:
    """Exactly one error event, nothing after it, no clean end; returns how many events came before it."""
    status, body, _ = body_of(raw)
    assert status == 200
    assert SECRET.encode() not in raw
    events = events_of(body)
    errors = [index for index, event in enumerate(events) if is_error(what, *event)]
    assert errors == [len(events) - 1], events[-3:]
    assert not any(is_clean_end(*event) for event in events)
    assert outcome["outcome"] == "failed", outcome
    assert outcome["code"] in ("upstream_error", "upstream_timeout")
    return errors[0]


def broken(gateway: GatewayProcess, what: str, directive: str, **how: Any) -> tuple[bytes, dict[str, Any]]:
    """One stream to its end (the server must close), and its row in the ledger."""
    request_id = f"broken-{next(_numbers)}"
    with Wire(how.pop("port", gateway.port), PATHS[what], asking(what, directive, stream=True),
              request_id=request_id, **how) as call:  # fmt: skip
        raw = call.read_all()
    return raw, ledger(gateway, request_id)


@pytest.mark.parametrize("what", EVENTS)
@pytest.mark.parametrize("lie", LIES)
def test_every_place_in_every_dialect(gateway: GatewayProcess, what: str, lie: str) -> None:
    """All places for what is quick; three of them for a hang, which takes as long as IDLE_SECONDS."""
    last = EVENTS[what]
    places = [0, last // 2, last - 1] if "hang" in lie else range(last)
    for k in places:
        raw, row = broken(gateway, what, f"tokens={TOKENS},{lie.format(k=k)}")

        before = check_broken(what, raw, row)
        assert before <= k, (k, before)
        if what == "chat":
            assert row["completion_tokens"] == max(0, min(k - 1, TOKENS)), "as many as the caller was given"


@pytest.mark.parametrize("what", EVENTS)
def test_the_engines_own_error_event_is_not_followed_by_a_clean_end(gateway: GatewayProcess, what: str) -> None:
    for k in range(TOKENS):
        raw, row = broken(gateway, what, f"tokens={TOKENS},error_after={k}")

        check_broken(what, raw, row)


@pytest.mark.parametrize("what", EVENTS)
def test_the_same_through_nginx(gateway: GatewayProcess, edge: Any, what: str) -> None:
    for lie in LIES:
        for k in (0, 2, EVENTS[what] - 1):
            directive = f"tokens={TOKENS},{lie.format(k=k)}"
            raw, row = broken(gateway, what, directive, port=edge.https, trust=edge.trust())

            check_broken(what, raw, row)


@pytest.mark.parametrize(
    ("directive", "status"),
    [
        ("die=headers", 502),
        ("die=headers,how=rst", 502),
        ("garbage=headers", 502),
        ("status=500", 502),
        ("status=503", 503),
        ("hang=headers", 504),
        ("json=broken", 502),
        ("die_after=40", 502),
        ("hang_after=40", 504),
        ("error_after=2", 502),
    ],
)
@pytest.mark.parametrize("what", ["chat", "messages", "embeddings"])
def test_before_the_first_byte_it_is_an_error_with_a_status(
    gateway: GatewayProcess, what: str, directive: str, status: int
) -> None:
    if what == "embeddings" and directive == "error_after=2":
        return  # it generates nothing that could fail in the middle
    request_id = f"broken-{next(_numbers)}"
    answer = gateway.post(PATHS[what], asking(what, directive), x_request_id=request_id)

    assert answer.status == status
    error = answer.json["error"]
    assert {"message", "type", "code", "param"} <= set(error)
    assert (answer.json.get("type") == "error") == (what == "messages")
    assert SECRET not in answer.body.decode()
    assert answer.headers["x-request-id"] == request_id
    row = ledger(gateway, request_id)
    assert (row["outcome"], row["status"]) == ("failed" if status != 503 else "refused", status)


def test_nothing_stays_behind_after_all_that(gateway: GatewayProcess, engine: VllmDouble) -> None:
    at_rest(gateway, engine, seconds=3.0)


def test_a_killed_engine_ends_every_stream_and_comes_back(tmp_path: Any) -> None:
    with VllmDouble(pace_ms=20) as engine, GatewayProcess(VLLM_URL=engine.url) as gateway:
        calls = [
            (
                what,
                Wire(gateway.port, PATHS[what], asking(what, "tokens=3000", stream=True), request_id=f"killed-{n}"),
                n,
            )
            for n, what in enumerate([*EVENTS] * 3)
        ]
        for _, call, _ in calls:
            call.read_until(b"brown")

        engine.kill()

        for what, call, n in calls:
            check_broken(what, call.read_all(), ledger(gateway, f"killed-{n}"))
            call.close()
        wait_until("the gateway is not ready", lambda: gateway.get("/ready").status == 503, patience(5.0))
        refused = gateway.chat()
        assert (refused.status, refused.code) == (503, "no_backend")
        assert int(refused.headers["retry-after"]) >= 1
        engine.start()
        wait_until("the gateway is ready again", lambda: gateway.get("/ready").status == 200, patience(10.0))
        assert gateway.chat().status == 200


def test_a_stopped_engine_is_given_up_and_its_breaker_opens(tmp_path: Any) -> None:
    """SIGSTOP: connections stand, nothing comes; /health hangs as well."""
    with (
        VllmDouble(pace_ms=20) as engine,
        GatewayProcess(VLLM_URL=engine.url, IDLE_SECONDS=0.5, FIRST_BYTE_SECONDS=0.5, KEEP_ALIVE_SECONDS=0.2,
                       BREAKER_FAILURES=3, BREAKER_SECONDS=1) as gateway,
    ):  # fmt: skip
        calls = [Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=3000", stream=True)) for _ in range(3)]
        for call in calls:
            call.read_until(b"brown")
        engine.signal(signal.SIGSTOP)
        stopped = time.monotonic()

        for call in calls:
            raw = call.read_all()
            assert b": keep-alive\n\n" in raw
            assert b'"upstream_timeout"' in raw
            assert b"[DONE]" not in raw
            call.close()
        assert time.monotonic() - stopped < patience(3.0)
        assert metric(gateway, "gateway_breaker_state") == 2
        assert gateway.get("/ready").status == 503
        assert gateway.chat().status == 503

        engine.signal(signal.SIGCONT)
        wait_until("a probe closes the breaker", lambda: gateway.chat().status == 200, patience(10.0))
        assert metric(gateway, "gateway_breaker_state") == 0


def test_an_idle_connection_that_the_engine_closed_costs_no_call(tmp_path: Any) -> None:
    """vLLM closes idle connections; a call that meets the closing goes out again, unseen by the caller."""
    with VllmDouble(keep_alive=0.05) as engine, GatewayProcess(VLLM_URL=engine.url) as gateway:
        statuses = []
        for _ in range(40):
            statuses.append(gateway.chat("double:tokens=2").status)
            ended = time.monotonic() + 0.05
            wait_until("about the time at which the engine closes", lambda: time.monotonic() > ended, every=0.01)  # noqa: B023

        assert statuses == [200] * 40
        worked = [request for request in engine.requests() if request["path"] == PATHS["chat"]]
        assert len(worked) == 40, "and the engine worked once for each"
