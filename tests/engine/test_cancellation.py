"""A client that goes, in whatever phase and by whatever way: within a second the real engine no longer works for it, and
everything that the call had taken is given back and recorded."""

from __future__ import annotations

import itertools
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.doubles.edge_running import NGINX
from tests.doubles.flow_patient import Patient
from tests.doubles.flow_site import PATHS, Wire, edge_before, ledger, metric, query
from tests.doubles.gateway import GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import wait_until
from tests.engine.conftest import real

pytestmark = pytest.mark.timeout(900)  # the first of these tests may wait for the engine's start
WAYS = ["fin", "rst", "nginx", "timeout"]
SECONDS = 1.0
# The engine looks at who has left between two steps, and publishes its gauges with a step: the one in which it learns of
# it and the one before. Where steps are so long that this takes more than a second, it is these two and no more.
STEPS = 2
STORY = [{"role": "user", "content": "Tell a very long story about the sea."}]
_numbers = itertools.count(1)
_gauges = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_steps = re.compile(rb"^vllm:iteration_tokens_total_count\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_tokens = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)


def told(engine: Any, pattern: re.Pattern[bytes]) -> float:
    """A sum over the engine's own metrics."""
    with urllib.request.urlopen(f"{engine.url}/metrics", timeout=10) as page:
        return sum(float(value) for value in pattern.findall(page.read()))


def at_work(engine: Any) -> float:
    """Requests that run or wait in the engine."""
    return told(engine, _gauges)


def prompt() -> list[int]:
    """4,000 tokens that no prefix cache has seen: more than ten seconds of work on two cores."""
    number = next(_numbers)
    return [(place * 7 + number * 1009) % 40_000 + 100 for place in range(4_000)]


def body_of(phase: str, model: str) -> tuple[str, dict[str, Any]]:
    """Route and body of a call that comes to `phase` and stays there for long."""
    if phase == "prefill":
        return PATHS["completions"], {"model": model, "prompt": prompt(), "max_tokens": 50, "stream": True}
    if phase == "embeddings":
        return PATHS["embeddings"], {"model": model, "input": prompt()}
    body = {"model": model, "messages": STORY, "max_tokens": 4000, "ignore_eos": True}
    return PATHS["chat"], {**body, "stream": phase != "not streaming"}


@pytest.fixture(scope="module")
def gateway(engine: Any) -> Iterator[GatewayProcess]:
    """With a single place, so that a place that is not given back fails the next test."""
    with GatewayProcess(VLLM_URL=engine.url, VLLM_API_KEY=engine.api_key, ENGINE_CONCURRENCY=1) as process:
        yield process


@pytest.fixture(scope="module")
def edge(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if NGINX is None:
        pytest.skip("nginx is not installed on this machine")
    with edge_before(gateway, tmp_path_factory.mktemp("edge")) as running:
        yield running


class Reader(Wire):
    """A raw connection, left by FIN or RST."""

    how = "fin"

    def read_some(self) -> None:
        while self.received.count(b"data: ") < 5:
            part = self.socket.recv(65536)
            assert part
            self.received += part

    def leave(self) -> None:
        self.close(self.how)


def begin(gateway: GatewayProcess, edge: Any, model: str, phase: str, way: str) -> tuple[Any, str]:
    """Send a call; what sent it, and its id."""
    request_id = f"leaves-{phase.replace(' ', '-')}-{way}-{next(_numbers)}"
    path, body = body_of(phase, model)
    if way == "timeout":
        return Patient(gateway, path, body, request_id), request_id
    if way == "nginx":
        return Reader(edge.https, path, body, trust=edge.trust(), request_id=request_id), request_id
    client = Reader(gateway.port, path, body, request_id=request_id)
    client.how = way
    return client, request_id


def waiting(gateway: GatewayProcess) -> list[str]:
    """Ids of the calls in the gateway's waiting room."""
    return [entry["request_id"] for entry in gateway.admin("GET", "/admin/queue").json["data"]]


def soon(what: str, look: Callable[[], Any], expected: Any, left: float) -> None:
    """What `look` tells is as expected within the promised time since `left` (monotonic seconds; more on a busy
    machine); at once where that is over."""
    seen: list[Any] = []

    def as_expected() -> bool:
        seen.append((round(time.monotonic() - left, 3), look()))
        return bool(seen[-1][1] == expected)

    try:
        wait_until(what, as_expected, max(0.1, patience(SECONDS) - (time.monotonic() - left)))
    except AssertionError:
        raise AssertionError(f"{what}: {expected} expected, seen {seen[0]} … {seen[-1]}") from None


class Leaving:
    """Measures what an engine still does for a client that leaves now."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.steps = told(engine, _steps)
        self.at = time.monotonic()

    def freed(self, what: str) -> None:
        """Within a second, or with the step in flight and the next, the engine works for nobody."""
        wait_until("the engine is free", lambda: at_work(self.engine) == 0, 30)
        took, steps = time.monotonic() - self.at, told(self.engine, _steps) - self.steps
        print(f"{what}: free after {took:.2f} s, {steps:.0f} steps")
        assert took <= SECONDS or steps <= STEPS, (took, steps)


def check(gateway: GatewayProcess, request_id: str, left: float, others: int) -> dict[str, Any]:
    """The gateway holds nothing for the call and has recorded it; `others` calls go on."""
    rows = "SELECT request_id FROM holds WHERE request_id = ?"
    soon("the call's hold is gone", lambda: query(gateway, rows, request_id), [], left)
    gauges = ("gateway_in_flight_calls", "gateway_holds", "gateway_queue_calls")
    soon("what is in flight and held is what others have",
         lambda: [metric(gateway, name) for name in gauges], [others, others, 0], left)  # fmt: skip
    assert waiting(gateway) == []
    row = ledger(gateway, request_id)
    line = gateway.closed(request_id)
    assert (row["outcome"], line["outcome"]) == ("cancelled", "cancelled")
    return row


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("phase", ["prefill", "decode", "not streaming"])
def test_the_engine_is_free_within_a_second(gateway: GatewayProcess, edge: Any, engine: Any, phase: str, way: str):
    wait_until("the engine is idle", lambda: at_work(engine) == 0, 30)
    client, request_id = begin(gateway, edge, engine.model, phase, way)
    if phase == "decode":
        client.read_some()
    wait_until("the engine works", lambda: at_work(engine) >= 1, 30)
    if phase == "not streaming":
        made = told(engine, _tokens)
        wait_until("some tokens", lambda: told(engine, _tokens) >= made + 5, 30)

    leaving = Leaving(engine)
    client.leave()

    leaving.freed(f"{phase}, {way}")
    row = check(gateway, request_id, leaving.at, others=0)
    assert row["backend"] is not None
    if phase == "decode":
        assert row["completion_tokens"] >= 3
    elif phase == "prefill":
        assert row["completion_tokens"] == 0, "it was left before its first token"


@pytest.mark.parametrize("way", WAYS)
def test_who_leaves_the_waiting_room_is_never_sent_to_the_engine(
    gateway: GatewayProcess, edge: Any, engine: Any, way: str
):
    wait_until("the engine is idle", lambda: at_work(engine) == 0, 30)
    name = f"stays-{way}-{next(_numbers)}"
    with Reader(gateway.port, *body_of("decode", engine.model), request_id=name) as other:
        other.read_some()
        client, request_id = begin(gateway, edge, engine.model, "queued", way)
        wait_until("the call waits", lambda: waiting(gateway) == [request_id])

        left = time.monotonic()
        client.leave()

        soon("nobody waits", lambda: waiting(gateway), [], left)
        row = check(gateway, request_id, left, others=1)
        assert (row["prompt_tokens"], row["completion_tokens"], row["backend"]) == (0, 0, None)
        assert at_work(engine) >= 1
        leaving = Leaving(engine)
        other.leave()
        leaving.freed("the other")


@pytest.fixture(scope="module")
def pooling(built: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same model as an engine of embeddings."""
    options = {"VLLM_EXTRA_ARGS": "--runner pooling --convert embed", "MAX_NUM_BATCHED_TOKENS": "256"}
    with real(tmp_path_factory.mktemp("pooling"), built, **options) as running:
        yield running.ready()


@pytest.mark.long
def test_embeddings_are_given_up_as_well(pooling: Any, tmp_path_factory: pytest.TempPathFactory):
    """All ways in one test: the engine takes most of a minute to start."""
    if NGINX is None:
        pytest.skip("nginx is not installed on this machine")
    with (
        GatewayProcess(VLLM_URL=pooling.url, VLLM_API_KEY=pooling.api_key, ENGINE_CONCURRENCY=1) as gateway,
        edge_before(gateway, tmp_path_factory.mktemp("edge")) as edge,
    ):
        for way in WAYS:
            wait_until("the engine is idle", lambda: at_work(pooling) == 0, 30)
            client, request_id = begin(gateway, edge, pooling.model, "embeddings", way)
            wait_until("the engine works", lambda: at_work(pooling) == 1, 30)

            leaving = Leaving(pooling)
            client.leave()

            leaving.freed(f"embeddings, {way}")
            row = check(gateway, request_id, leaving.at, others=0)
            assert row["completion_tokens"] == 0
        answer = gateway.post(PATHS["embeddings"], {"model": pooling.model, "input": "one two three"})
        assert answer.status == 200
        assert answer.json["usage"]["prompt_tokens"] == 3
