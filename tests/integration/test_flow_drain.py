"""Stopping, restarting, and losing an engine under load: no admitted call is lost, and every ending is true."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from typing import Any

from tests.doubles.crowd import Crowd, Seen, crowd
from tests.doubles.flow_site import PATHS, Wire, asking, body_of, ledger, query
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble, wait_until


def test_running_calls_finish_waiting_ones_are_served_new_ones_are_refused() -> None:
    with VllmDouble() as engine, GatewayProcess(VLLM_URL=engine.url, ENGINE_CONCURRENCY=2, DRAIN_SECONDS=20) as gateway:
        calls = [
            Wire(
                gateway.port,
                PATHS["chat"],
                asking("chat", "tokens=40,pace_ms=20", stream=True),
                request_id=f"drained-{n}",
            )
            for n in range(4)
        ]
        wait_until("two run", lambda: engine.state()["running"] == 2)
        process = gateway.process
        assert process is not None

        gateway.signal(signal.SIGTERM)
        wait_until("it is not ready", lambda: gateway.get("/ready").status == 503)
        refused = gateway.chat()

        assert (refused.status, refused.code) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) >= 1
        for call in calls:
            status, body, clean = body_of(call.read_until(b"[DONE]") + call.read_all())
            assert (status, clean) == (200, True)
            assert body.endswith(b"data: [DONE]\n\n")
            call.close()
        assert process.wait(10) == 0
        rows = query(gateway, "SELECT request_id, outcome FROM usage_records WHERE request_id LIKE 'drained-%'")
        assert sorted((row["request_id"], row["outcome"]) for row in rows) == [(f"drained-{n}", "ok") for n in range(4)]
        assert query(gateway, "SELECT * FROM holds") == []


def test_what_outlasts_the_drain_ends_with_an_error_and_is_settled() -> None:
    with VllmDouble() as engine, GatewayProcess(VLLM_URL=engine.url, DRAIN_SECONDS=0.5) as gateway:
        calls = {
            what: Wire(
                gateway.port,
                PATHS[what],
                asking(what, "tokens=4000,pace_ms=20", stream=True),
                request_id=f"drain-{what}",
            )
            for what in ("chat", "messages", "responses")
        }
        for call in calls.values():
            call.read_until(b"jumps")
        whole = Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=4000,pace_ms=20"), request_id="drain-whole")
        wait_until("all run", lambda: engine.state()["running"] == 4)

        assert gateway.terminate() == 0

        marks = {"chat": b'data: {"error"', "messages": b"event: error\n", "responses": b"event: response.failed\n"}
        for what, call in calls.items():
            raw = call.read_all()
            call.close()
            assert raw.count(marks[what]) == 1, what
            assert b"[DONE]" not in raw
            assert b"message_stop" not in raw
            row = ledger(gateway, f"drain-{what}")
            assert (row["outcome"], row["code"]) == ("interrupted", "shutting_down")
            if what == "chat":
                assert row["completion_tokens"] >= 5
        status, body, _ = body_of(whole.read_all())
        whole.close()
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        assert query(gateway, "SELECT * FROM holds") == []
        wait_until("the engine is free", lambda: engine.state()["running"] == 0, patience(1.0))


def test_two_signals_stop_once() -> None:
    with VllmDouble() as engine, GatewayProcess(VLLM_URL=engine.url, DRAIN_SECONDS=10) as gateway:
        call = Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=30,pace_ms=20", stream=True))
        call.read_until(b"brown")
        gateway.signal(signal.SIGTERM)

        assert gateway.terminate() == 0
        assert call.read_all().rstrip().endswith(b"0")
        assert b"[DONE]" in call.received
        call.close()


async def test_a_restart_under_load_loses_no_admitted_call() -> None:
    """Callers that are refused, or find nobody, come again; whoever got a 200 gets the whole answer."""
    with VllmDouble() as engine, GatewayProcess(VLLM_URL=engine.url, ENGINE_CONCURRENCY=8) as gateway:
        url = gateway.url
        gateway.environment["GATEWAY_PORT"] = str(gateway.port)
        stop = asyncio.Event()

        async def caller(people: Crowd) -> None:
            while not stop.is_set():
                seen = await people.call(KEY, "tokens=10,pace_ms=20", max_tokens=10)
                if seen.status != 200:
                    await asyncio.sleep(0.05)

        async with crowd(url) as people:
            callers = [asyncio.create_task(caller(people)) for _ in range(12)]
            for _ in range(2):
                enough = sum(seen.whole for seen in people.calls) + 30
                await until(lambda: sum(seen.whole for seen in people.calls) >= enough)  # noqa: B023
                assert await asyncio.to_thread(gateway.terminate) == 0
                await asyncio.to_thread(gateway.start)
            enough = sum(seen.whole for seen in people.calls) + 30
            await until(lambda: sum(seen.whole for seen in people.calls) >= enough)
            stop.set()
            await asyncio.gather(*callers)

        admitted = [seen for seen in people.calls if seen.status == 200]
        assert [seen for seen in admitted if not seen.whole] == []
        assert {seen.error for seen in people.calls if seen.status == 503} <= {"shutting_down", "no_backend"}
        rows = Counter(row["request_id"] for row in query(gateway, "SELECT request_id FROM usage_records"))
        assert all(rows[seen.request_id] == 1 for seen in admitted)
        outcomes = query(gateway, "SELECT outcome, COUNT(*) AS n FROM usage_records WHERE status = 200 GROUP BY 1")
        assert [row["outcome"] for row in outcomes] == ["ok"]


async def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait without holding the loop."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, "in vain"
        await asyncio.sleep(0.02)


async def test_of_two_engines_the_death_of_one_ends_only_what_had_begun_on_it() -> None:
    with VllmDouble() as one, VllmDouble() as two:
        backends = json.dumps([{"name": "one", "url": one.url}, {"name": "two", "url": two.url}])
        with GatewayProcess(BACKENDS=backends, ENGINE_CONCURRENCY=16, RETRY_RATIO=1, BREAKER_SECONDS=1) as gateway:
            stop = asyncio.Event()

            async def caller(people: Crowd, number: int) -> None:
                while not stop.is_set():
                    # Every other call is in prefill for long, so that some are there when the engine dies.
                    told = "tokens=10,pace_ms=20" if number % 2 else "tokens=2,prefill_ms=200"
                    await people.call(KEY, told, words=number, max_tokens=10)

            async with crowd(gateway.url) as people:
                callers = [asyncio.create_task(caller(people, number)) for number in range(16)]
                await until(lambda: len(people.calls) >= 40)
                assert one.state()["requests"] > 5
                assert two.state()["requests"] > 5
                before = len(people.calls)
                await asyncio.to_thread(one.kill)
                killed = time.monotonic()
                await until(lambda: len(people.calls) >= before + 60)
                stop.set()
                await asyncio.gather(*callers)

            lost = [seen for seen in people.calls if not seen.whole]
            assert len(lost) <= 16
            later = [
                (s.began - killed, s.ended - killed, s.status, s.error, s.events) for s in lost if s.began > killed
            ]
            assert later == [], "what came later was served by the other"
            assert all(seen.status == 200 and seen.error == "upstream_error" for seen in lost), [
                (seen.status, seen.error) for seen in lost
            ]
            one.start()
            await until(lambda: up(gateway) == 2)
            async with crowd(gateway.url) as people:
                await asyncio.gather(*(people.call(KEY, "tokens=2", words=n) for n in range(30)))
            assert {(seen.status, seen.whole) for seen in people.calls} == {(200, True)}
            assert one.state()["requests"] > 0, "it is used again"


def up(gateway: GatewayProcess) -> float:
    """How many engines are healthy with a closed or half-open breaker."""
    text = gateway.get("/metrics", key=None).body.decode()
    healthy = {line.split(" ")[0].split("{")[1] for line in text.splitlines()
               if line.startswith("gateway_backend_up{") and line.endswith(" 1.0")}  # fmt: skip
    open_ones = {line.split(" ")[0].split("{")[1] for line in text.splitlines()
                 if line.startswith("gateway_breaker_state{") and line.endswith(" 2.0")}  # fmt: skip
    return len(healthy - open_ones)


async def test_a_call_that_meets_a_dead_engine_is_served_by_the_other() -> None:
    with VllmDouble() as one, VllmDouble() as two:
        backends = json.dumps([{"name": "one", "url": one.url}, {"name": "two", "url": two.url}])
        with GatewayProcess(BACKENDS=backends, HEALTH_SECONDS=30, RETRY_RATIO=1) as gateway:
            one.kill()  # nobody has noticed: the next health check is far away
            async with crowd(gateway.url) as people:
                answers: list[Seen] = [await people.call(KEY, "tokens=2", words=number) for number in range(12)]

            assert [(seen.status, seen.whole) for seen in answers] == [(200, True)] * 12
            assert "gateway_retries_total" in gateway.get("/metrics", key=None).body.decode()
