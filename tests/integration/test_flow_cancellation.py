"""A client that leaves — waiting, in prefill, in decode, not streaming — ends the engine's work within a second."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tests.doubles.edge_running import NGINX
from tests.doubles.flow_patient import Patient
from tests.doubles.flow_site import PATHS, Wire, asking, at_rest, edge_before, ledger
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble, wait_until

PLACES = 2
_numbers = itertools.count()

# phase -> (dialect, directive, body fields, the engine's state when the client leaves)
PHASES: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "queued": ("chat", "tokens=5", {"stream": True}, None),
    "prefill": ("chat", "prefill_ms=60000", {"stream": True}, "prefill"),
    "decode": ("chat", "tokens=3000,pace_ms=20", {"stream": True}, "decode"),
    "decode of messages": ("messages", "tokens=3000,pace_ms=20", {"stream": True}, "decode"),
    "decode of responses": ("responses", "tokens=3000,pace_ms=20", {"stream": True}, "decode"),
    "not streaming": ("chat", "tokens=3000,pace_ms=20", {}, "decode"),
    "embeddings": ("embeddings", "prefill_ms=60000", {}, "prefill"),
    # More than the server buffers comes in one read: the socket must be read again once the body is taken.
    "queued, large body": ("chat", "tokens=5", {"stream": True, "user": "x" * 100_000}, None),
    "prefill, large body": ("chat", "prefill_ms=60000", {"user": "x" * 100_000}, "prefill"),
    "prefill, larger body": ("chat", "prefill_ms=60000", {"stream": True, "user": "x" * 400_000}, "prefill"),
}


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    with GatewayProcess(VLLM_URL=engine.url, ENGINE_CONCURRENCY=PLACES) as running:
        yield running


@pytest.fixture(scope="module")
def edge(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if NGINX is None:
        pytest.skip("nginx is not installed on this machine")
    with edge_before(gateway, tmp_path_factory.mktemp("edge")) as running:
        yield running


def begin(engine: VllmDouble, gateway: GatewayProcess, phase: str, **how: Any) -> tuple[Wire, str, list[Wire]]:
    """A call that has come to `phase`, its id, and the calls that keep it waiting."""
    what, directive, fields, state = PHASES[phase]
    request_id = f"cancel-{next(_numbers)}"
    others = fill(engine, gateway) if state is None else []
    port = how.pop("port", gateway.port)
    call = Wire(port, PATHS[what], asking(what, directive, **fields), request_id=request_id, **how)
    reached(engine, gateway, request_id, state)
    if state == "decode" and fields:
        call.read_until(b"brown")
    return call, request_id, others


def fill(engine: VllmDouble, gateway: GatewayProcess) -> list[Wire]:
    """Calls that take every place."""
    body = asking("chat", "prefill_ms=60000", stream=True)
    others = [Wire(gateway.port, PATHS["chat"], body) for _ in range(PLACES)]
    wait_until("every place is taken", lambda: engine.state()["running"] == PLACES)
    return others


def reached(engine: VllmDouble, gateway: GatewayProcess, request_id: str, state: str | None) -> None:
    """Wait until a call has come to `state`; None: it waits in the gateway."""
    if state is None:
        wait_until("the call waits", lambda: [e["request_id"] for e in queue(gateway)] == [request_id])
    else:
        wait_until(f"the engine is in {state}", lambda: record(engine, request_id).get("state") == state)
    if state == "decode":
        wait_until("some tokens", lambda: record(engine, request_id)["completion_tokens"] >= 3)


def record(engine: VllmDouble, request_id: str) -> dict[str, Any]:
    found = [entry for entry in engine.requests() if entry["request_id"] == request_id]
    return found[-1] if found else {}


def queue(gateway: GatewayProcess) -> list[dict[str, Any]]:
    answer = gateway.admin("GET", "/admin/queue").json
    return answer["data"] if isinstance(answer, dict) else answer


def check(engine: VllmDouble, gateway: GatewayProcess, phase: str, request_id: str, left: float) -> None:
    """Within a second of `left` (more on a busy machine) the work has ended, and everything is given back and recorded."""
    state = PHASES[phase][3]
    if state is None:
        wait_until("the call waits no more", lambda: not queue(gateway), patience(1.0))
        assert record(engine, request_id) == {}, "the engine never heard of it"
    else:
        ended = wait_until("the engine's request ended", lambda: record(engine, request_id)["ended_at"], patience(1.0))
        assert ended - left < patience(1.0)
        assert record(engine, request_id)["state"] == "cancelled"
    row = ledger(gateway, request_id)
    made = record(engine, request_id).get("completion_tokens", 0)
    assert row["outcome"] == "cancelled"
    if PHASES[phase][2] and state == "decode":
        assert made - 3 <= row["completion_tokens"] <= made, "what was on its way when the client left"
        assert row["completion_tokens"] >= 3


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("phase", PHASES)
def test_leaving_directly(engine: VllmDouble, gateway: GatewayProcess, phase: str, how: str) -> None:
    call, request_id, others = begin(engine, gateway, phase)

    left = time.time()
    call.close(how)

    check(engine, gateway, phase, request_id, left)
    for other in others:
        other.close()
    at_rest(gateway, engine)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("phase", PHASES)
def test_leaving_through_nginx(engine: VllmDouble, gateway: GatewayProcess, edge: Any, phase: str, how: str) -> None:
    call, request_id, others = begin(engine, gateway, phase, port=edge.https, trust=edge.trust())

    left = time.time()
    call.close(how)

    check(engine, gateway, phase, request_id, left)
    for other in others:
        other.close()
    at_rest(gateway, engine)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if "messages" not in phase])
def test_the_official_client_runs_out_of_patience(engine: VllmDouble, gateway: GatewayProcess, phase: str) -> None:
    what, directive, fields, state = PHASES[phase]
    request_id = f"patience-{next(_numbers)}"
    others = fill(engine, gateway) if state is None else []
    client = Patient(gateway, PATHS[what], asking(what, directive, **fields), request_id)
    reached(engine, gateway, request_id, state)
    if state == "decode" and fields:
        wait_until("some events", lambda: client.received >= 3)

    left = time.time()
    client.leave()

    check(engine, gateway, phase, request_id, left)
    for other in others:
        other.close()
    at_rest(gateway, engine)


def test_the_official_clients_own_timeout_ends_the_work(engine: VllmDouble, gateway: GatewayProcess) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=0.4) as client:
        body = asking("chat", "prefill_ms=60000", stream=True)
        with pytest.raises(openai.APITimeoutError):
            list(client.chat.completions.create(**body, extra_headers={"x-request-id": "own-timeout"}))

    left = time.time()
    ended = wait_until("the engine's request ended", lambda: record(engine, "own-timeout")["ended_at"], patience(1.0))
    assert ended - left < patience(1.0)
    assert ledger(gateway, "own-timeout")["outcome"] == "cancelled"
    at_rest(gateway, engine)


def test_a_crowd_that_leaves_at_once_leaves_nothing_behind(engine: VllmDouble, gateway: GatewayProcess) -> None:
    calls = [
        Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=3000,pace_ms=20", stream=True)) for _ in range(40)
    ]
    wait_until("all have come", lambda: engine.state()["running"] + len(queue(gateway)) == 40)

    for number, call in enumerate(calls):
        call.close("rst" if number % 2 else "fin")

    at_rest(gateway, engine, seconds=2.0)
    assert engine.state()["most_running"] <= PLACES
