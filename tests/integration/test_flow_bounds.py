"""What strange callers may cost: a slow reader, a crowd that connects and drops, random bytes."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sqlite3
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.doubles.flow_site import PATHS, Wire, asking, at_rest, ledger, query
from tests.doubles.gateway import GatewayProcess
from tests.doubles.vllm import VllmDouble, wait_until

MEGABYTE = 1024 * 1024


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(max_model_len=1_000_000) as double:
        yield double


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    # The double fails (500) on some bodies that vLLM would refuse; several in a row are no outage here.
    with GatewayProcess(VLLM_URL=engine.url, BREAKER_FAILURES=100_000) as running:
        yield running


def process_of(gateway: GatewayProcess) -> psutil.Process:
    assert gateway.process is not None
    return psutil.Process(gateway.process.pid)


def memory(gateway: GatewayProcess) -> float:
    """Resident megabytes."""
    return process_of(gateway).memory_info().rss / MEGABYTE


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.long)])
def test_a_reader_that_stops_costs_a_bounded_buffer_and_slows_only_itself(
    gateway: GatewayProcess, engine: VllmDouble, seconds: int
) -> None:
    """The engine would send 400 MB to each; a reader that takes nothing for `seconds` holds it back."""
    gateway.chat("double:tokens=200,token_bytes=2000", stream=True)
    before = memory(gateway)
    body = asking("chat", "tokens=4000,token_bytes=100000", stream=True)
    readers = [
        Wire(gateway.port, PATHS["chat"], body, receive_buffer=4096, request_id=f"slow-{seconds}-reader-{n}")
        for n in range(5)
    ]
    sent = -1

    def stalled() -> bool:
        nonlocal sent
        last, sent = sent, engine.state()["generation_tokens"]
        return sent > 0 and sent == last

    wait_until("the engine is held back", stalled, 20.0, every=0.5)
    ends = time.monotonic() + seconds

    def long_enough() -> bool:
        quick = gateway.chat("double:tokens=50", stream=True)
        assert quick.body.endswith(b"[DONE]\n\n")
        return time.monotonic() > ends

    wait_until("the readers have not read for long enough", long_enough, seconds + 5.0, every=0.5)
    more = memory(gateway) - before
    print(f"five readers that stopped for {seconds} s: {more:+.1f} MB")
    assert more < 5 * 8, "megabytes for five readers"
    assert engine.state()["running"] == 5, "their calls go on"
    for reader in readers:
        reader.close("rst")
    at_rest(gateway, engine)
    assert ledger(gateway, f"slow-{seconds}-reader-0")["outcome"] == "cancelled"


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_connect_and_drop_leaves_descriptors_threads_and_memory_where_they_were(
    gateway: GatewayProcess, engine: VllmDouble, count: int
) -> None:
    def round_of(calls: int) -> None:
        chance = random.Random(calls)
        body = asking("chat", "tokens=50,pace_ms=10", stream=True)
        for number in range(calls):
            call = Wire(gateway.port, PATHS["chat"], body)
            if number % 3 == 1:
                call.read_until(b"data: ")
            call.close(chance.choice(["fin", "rst"]))
        for _ in range(calls // 4):  # … and some that never finish their head
            raw = socket.create_connection(("127.0.0.1", gateway.port))
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthor")
            raw.close()
        at_rest(gateway, engine, seconds=5.0)

    round_of(count)  # caches fill, pools open
    process = process_of(gateway)
    wait_until("idle engine connections are closed", lambda: len(process.net_connections()) < 20, 15.0)
    before = (process.num_fds(), process.num_threads(), memory(gateway))

    round_of(count)

    wait_until("descriptors are as before", lambda: process.num_fds() <= before[0] + 5, 15.0)
    assert process.num_threads() <= before[1] + 1
    more = memory(gateway) - before[2]
    print(f"{count} that connected and dropped: {process.num_fds() - before[0]:+d} descriptors, {more:+.1f} MB")
    assert more < 8, "megabytes"


def test_a_place_in_the_engine_is_free_while_a_record_is_being_written(engine: VllmDouble) -> None:
    """The first call's engine is done and its record waits for the database: the next call goes to the engine."""
    with GatewayProcess(VLLM_URL=engine.url, ENGINE_CONCURRENCY=1) as gateway:
        gateway.chat()
        path = gateway.environment["DATABASE_URL"].removeprefix("sqlite:///")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            first = Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=50,pace_ms=20", stream=True))
            first.read_until(b"jumps")
            second = Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=50", stream=True))
            with first, second:
                wait_until("the second waits", lambda: len(gateway.admin("GET", "/admin/queue").json["data"]) == 1)
                database.execute("BEGIN IMMEDIATE")
                second.read_until(b"jumps")
                first.socket.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while part := first.socket.recv(65536):
                        first.received += part
                database.execute("ROLLBACK")
                assert b"[DONE]" not in first.received, "its record is not written yet"
                first.socket.settimeout(20)
                first.read_until(b"[DONE]")
                second.read_until(b"[DONE]")


# Random bodies, near to real ones

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "input", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n",
     "best_of", "logprobs", "top_logprobs", "tools", "priority", "documents", "query", "system", "stop", "temperature"]
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=200),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(FIELDS, JSON, max_size=6).map(
        lambda fields: json.dumps(
            {"model": "double", "messages": [{"role": "user", "content": "x"}], **fields}
        ).encode()
    ),
)
ROUTES = [*PATHS.values(), "/v1/rerank", "/v1/score", "/v1/tokenize", "/v1/detokenize", "/v1/messages/count_tokens",
          "/v1/audio/transcriptions"]  # fmt: skip


def random_bodies(gateway: GatewayProcess, examples: int) -> None:
    seen: set[int] = set()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(ROUTES), BODIES)
    def check(path: str, body: bytes) -> None:
        answer = gateway.post(path, body)
        seen.add(answer.status)
        if answer.status >= 500:
            # The double crashes on what vLLM would refuse; the gateway says so and is not to blame.
            assert answer.status == 502, (path, body, answer.body)
            assert answer.code == "upstream_error"
        if answer.status != 200:
            assert {"message", "type", "code", "param"} <= set(answer.json["error"]), (path, body, answer.body)

    check()
    assert 400 in seen


def test_random_bodies_are_refused_and_never_break_anything(gateway: GatewayProcess, engine: VllmDouble) -> None:
    random_bodies(gateway, 300)

    assert gateway.chat().status == 200
    at_rest(gateway, engine, seconds=3.0)
    assert not [line for line in gateway.lines if line.get("level") in ("ERROR", "CRITICAL")]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_thousand_random_bodies(gateway: GatewayProcess, engine: VllmDouble) -> None:
    random_bodies(gateway, 1000)
    before = memory(gateway)
    random_bodies(gateway, 10_000)

    at_rest(gateway, engine, seconds=3.0)
    print(f"10,000 random bodies: {memory(gateway) - before:+.1f} MB")
    assert memory(gateway) - before < 16
    assert gateway.chat().status == 200


def test_the_ledger_has_each_of_these_calls_once(gateway: GatewayProcess) -> None:
    rows = query(gateway, "SELECT COUNT(*) AS n, COUNT(DISTINCT request_id) AS ids FROM usage_records")[0]

    assert rows["n"] == rows["ids"] > 100
