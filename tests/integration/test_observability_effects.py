"""Telling costs nobody an answer: collector, log reader and scraper may be slow or gone; series stay bounded."""

import http.client
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.monitoring import Collector, fetch
from tests.doubles.ports import free_ports
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

CALLS = 130  # more than the exporter sends at once
EXPORT_SECONDS = 5.0  # what it waits for the collector


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    with VllmDouble(alias=["double"]) as double:
        yield double


def seconds_of(gateway: GatewayProcess) -> float:
    """How long a call took; it must be answered."""
    status, seconds = _timed(gateway)
    assert status == 200
    return seconds


@pytest.mark.parametrize("state", ["down", "mute"])
def test_a_collector_that_is_down_or_mute_delays_no_answer(engine: VllmDouble, state: str) -> None:
    """Both gateways take turns, call by call, so that the machine's other work meets them alike."""
    with Collector(mute=True) as mute, GatewayProcess(VLLM_URL=engine.url) as quiet:
        endpoint = mute.url if state == "mute" else f"http://127.0.0.1:{free_ports(1)[0]}"
        with GatewayProcess(VLLM_URL=engine.url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, TRACE_RATIO=1) as telling:
            for gateway in (quiet, telling):
                seconds_of(gateway)  # warm
            if state == "mute":
                wait_until("the collector has a connection that it never answers", lambda: mute.bodies)
            pairs = [(seconds_of(quiet), seconds_of(telling)) for _ in range(CALLS)]
            added = statistics.median(told - silent for silent, told in pairs)
            assert added < 0.05, f"tracing to a {state} collector adds {added * 1000:.1f} ms"
            assert max(told for _, told in pairs) < EXPORT_SECONDS, "a call has waited for the collector"
            # It also stops in time: what cannot be delivered is given up.
            assert telling.terminate(30) == 0


@pytest.mark.parametrize("lines", [300, pytest.param(25_000, marks=pytest.mark.long)])
def test_a_log_reader_that_stops_reading_holds_nothing_up_and_the_loss_is_counted(
    engine: VllmDouble, tmp_path: Path, lines: int
) -> None:
    (port,) = free_ports(1)
    base = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"],
        env={
            **base,
            "GATEWAY_PORT": str(port),
            "GATEWAY_API_KEYS": f"test={KEY}",
            "VLLM_URL": engine.url,
            "HEALTH_SECONDS": "0.2",
            "DATABASE_URL": f"sqlite:///{tmp_path}/gateway.sqlite3",
        },
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)  # nobody ever reads the other end: the pipe fills after 64 KiB
    gateway = GatewayProcess()
    gateway.port = port
    try:
        wait_until("the gateway is ready", lambda: _answers(gateway))
        with ThreadPoolExecutor(8) as callers:
            statuses = list(callers.map(lambda _: gateway.chat().status, range(min(lines, 600))))
        assert set(statuses) == {200}  # who writes to a full pipe would wait for good
        if lines > 600:
            # The writer holds a bounded number of lines; what comes after is dropped, counted, and holds nothing up.
            wait_until("lines are dropped and counted", lambda: _refused(port, 1000) and _dropped(port) > 0)
            assert _timed(gateway)[0] == 200
    finally:
        process.terminate()
        os.close(reading)
        process.wait(60)
        gateway.__exit__()


def _refused(port: int, count: int) -> bool:
    """Calls with a wrong key, one line each, on one connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(count):
        connection.request("POST", "/v1/chat/completions", b"{}", {"Authorization": "Bearer sk-wrong-0123456789"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 401
    connection.close()
    return True


def _dropped(port: int) -> float:
    page = fetch(f"http://127.0.0.1:{port}/metrics")
    return float(re.findall(r"^gateway_log_lines_dropped_total (\S+)", page, re.M)[0])


def _answers(gateway: GatewayProcess) -> bool:
    try:
        return gateway.get("/ready").status == 200
    except OSError:
        return False


def _timed(gateway: GatewayProcess) -> tuple[int, float]:
    began = time.perf_counter()
    return gateway.chat().status, time.perf_counter() - began


def test_scrapers_that_do_not_read_delay_no_answer(engine: VllmDouble) -> None:
    with GatewayProcess(VLLM_URL=engine.url) as gateway:
        seconds_of(gateway)  # warm
        rounds = []
        for _ in range(6):
            alone = [seconds_of(gateway) for _ in range(10)]
            sockets = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(10)]
            try:
                for scraper in sockets:
                    scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
                seconds_of(gateway)  # the pages are made
                rounds.append((alone, [seconds_of(gateway) for _ in range(10)]))
            finally:
                for scraper in sockets:
                    scraper.close()
        added = statistics.median(statistics.median(beside) - statistics.median(alone) for alone, beside in rounds)
        assert added < 0.05, f"scrapers that do not read add {added * 1000:.1f} ms"


def series(gateway: GatewayProcess) -> int:
    """Time series that the gateway exports now."""
    page = fetch(f"{gateway.url}/metrics")
    return sum(1 for line in page.splitlines() if line and not line.startswith("#"))


def test_a_thousand_keys_and_random_model_names_make_no_series(engine: VllmDouble) -> None:
    """The stated bound: 3,000 series a gateway, whatever callers send."""
    secrets = [f"sk-series-{number:08d}" for number in range(1000)]
    seeds = ",".join(f"key{number}={secret}" for number, secret in enumerate(secrets))
    with GatewayProcess(VLLM_URL=engine.url, GATEWAY_API_KEYS=seeds) as gateway:
        chance = random.Random(4)

        def call(secret: str) -> None:
            kind = chance.random()
            if kind < 0.4:
                assert gateway.chat(key=secret).status == 200
            elif kind < 0.8:
                assert gateway.chat(key=secret, model=f"model-{chance.getrandbits(64):x}").status == 404
            else:
                path = f"/v1/{chance.getrandbits(64):x}"
                assert gateway.post(path, {"model": "double"}, key=secret).status == 404

        def warm() -> None:
            for secret in secrets[:50]:
                call(secret)

        warm()
        few = series(gateway)
        with ThreadPoolExecutor(8) as callers:
            list(callers.map(call, secrets))
        many = series(gateway)
        assert many < 3000
        assert many - few < 100, "series grow with keys or model names"
        page = fetch(f"{gateway.url}/metrics")
        assert not re.search(r"model-[0-9a-f]{8,}", page)
        keys = {line["key_id"] for line in gateway.lines if line.get("event") == "call_closed" and line["key_id"]}
        assert len(keys) > 700  # unknown routes are refused before the key is read
        assert not any(one in page for one in (*keys, *secrets))
