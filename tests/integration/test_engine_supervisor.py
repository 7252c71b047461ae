"""The supervisor over a double of vLLM: hangs, crashes, kills, drains, and that nobody is left behind."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.doubles.engine_running import RunningEngine, command_line, control, with_double
from tests.doubles.waiting import wait_until


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[RunningEngine]:
    with with_double(tmp_path) as running:
        yield running
    assert running.shared() == []


def ask(engine: RunningEngine, size: int = 10) -> int:
    """One call straight to the engine; its status."""
    body = json.dumps({"model": "double", "prompt": "x" * size}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{engine.url}/v1/completions", body, {"content-type": "application/json"}), timeout=60
    ) as answer:
        return int(answer.status)


def in_background(pool: ThreadPoolExecutor, engine: RunningEngine, size: int = 10) -> Future[int]:
    """A call that has reached the engine."""
    call = pool.submit(ask, engine, size)
    wait_until("the call to be inside", lambda: engine.metric("engine_calls") >= 1)
    return call


def test_starts_tells_and_drains(engine: RunningEngine) -> None:
    status = engine.wait_for("ready")
    assert engine.get("/ready")[0] == 200
    assert set(status["phase_seconds"]) == {"fetch", "weights", "compile", "warm-up"}
    assert engine.metric('engine_state{state="ready"}') == 1
    assert engine.metric('engine_ready_seconds{phase="total"}') > 0
    assert ask(engine) == 200
    assert engine.zombies() == []
    assert engine.stop() == 0
    wait_until("everyone to be gone", lambda: not engine.family())


@pytest.mark.parametrize("victim", ["engine_double.py core", "engine_double.py -m"])
def test_a_hang_is_seen_written_down_and_mended(engine: RunningEngine, victim: str) -> None:
    engine.wait_for("ready")
    process = next(p for p in engine.family() if victim in command_line(p) and "guard" not in command_line(p))
    with ThreadPoolExecutor() as pool:
        process.send_signal(signal.SIGSTOP)
        call = pool.submit(ask, engine)
        wait_until("not ready", lambda: engine.get("/ready")[0] == 503)
        assert call.exception(60) is not None  # ended, not left hanging
    again = engine.wait_for("ready")
    assert again["restarts"] == 1
    assert engine.metric('engine_restarts_total{reason="hung"}') == 1
    [folder] = engine.evidence()
    assert {"report.json", "log.txt", "processes.json"} <= {file.name for file in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert "no progress" in report["reason"]
    stopped = json.loads((folder / "processes.json").read_text())
    assert [entry["pid"] for entry in stopped if entry["state"] == "T"] == [process.pid]
    assert any("engine_double.py" in stack.read_text() for stack in folder.glob("stacks-*.txt"))
    assert not process.is_running()
    assert ask(engine) == 200


def test_a_prefill_ten_times_as_long_as_usual_is_no_hang(tmp_path: Path) -> None:
    """Ten seconds of silence with a bound of four, because a prompt of 40 kB is inside; without it that is a hang."""
    engine = with_double(tmp_path)
    control(engine, prefill=0.02)  # seconds a kilobyte: what the warm-up measures
    with engine:
        engine.wait_for("ready")
        control(engine, prefill=0.25)
        with ThreadPoolExecutor() as pool:
            call = in_background(pool, engine, 40_000)
            assert call.result(60) == 200
        assert engine.status()["restarts"] == 0
        assert engine.evidence() == []


@pytest.mark.parametrize(
    ("victim", "reason"),
    [("engine.guard", "killed"), ("engine_double.py -m", "killed"), ("engine_double.py core", "engine_dead")],
)
def test_whoever_is_killed_it_comes_back_whole(engine: RunningEngine, victim: str, reason: str) -> None:
    engine.wait_for("ready")
    family = {process.pid: process for process in engine.family() if process.pid != engine.process.pid}
    found = [p for p in family.values() if victim in command_line(p)]
    target = found[0] if victim == "engine.guard" else next(p for p in found if "guard" not in command_line(p))
    target.kill()
    wait_until("a restart", lambda: engine.status().get("restarts") == 1)
    engine.wait_for("ready")
    assert engine.metric(f'engine_restarts_total{{reason="{reason}"}}') == 1
    wait_until("all of the old ones are gone", lambda: not [p for p in family.values() if p.is_running()])
    assert engine.zombies() == []
    assert [name.partition("_")[0] for name in engine.shared()] == ["psm", "sem.double"]
    assert ask(engine) == 200


def test_the_supervisor_killed_leaves_nobody(engine: RunningEngine) -> None:
    engine.wait_for("ready")
    assert len(engine.family()) >= 5
    engine.process.kill()
    engine.process.wait()
    wait_until("everyone to be gone", lambda: not engine.family())
    assert engine.shared() == []
    engine.start()
    engine.wait_for("ready")


def test_a_model_that_cannot_start_is_failed_with_the_reason(tmp_path: Path) -> None:
    engine = with_double(tmp_path)
    control(engine, start="crash", says="ValueError: Unknown quantization method: awqq.")
    with engine:
        status = engine.wait_for("failed")
        assert "QUANTIZATION" in status["reason"]
        assert status["last_lines"]
        assert engine.get("/ready")[0] == 503
        assert engine.get("/health")[0] == 200
        assert status["restarts"] == 1  # not a crash loop
        control(engine)
        engine.process.send_signal(signal.SIGHUP)
        engine.wait_for("ready")


def test_the_same_failure_twice_is_enough(tmp_path: Path) -> None:
    engine = with_double(tmp_path)
    control(engine, start="crash", says="RuntimeError: something odd")
    with engine:
        status = engine.wait_for("failed")
        assert status["restarts"] == 2
        assert "something odd" in status["reason"]


def test_a_start_that_never_ends_is_broken_off(tmp_path: Path) -> None:
    engine = with_double(tmp_path, ENGINE_START_SECONDS="1")
    control(engine, start="never")
    with engine:
        assert "ENGINE_START_SECONDS" in engine.wait_for("failed")["reason"]
        assert engine.metric('engine_restarts_total{reason="start_timeout"}') == 2


def test_the_budget_of_restarts(tmp_path: Path) -> None:
    with with_double(tmp_path, ENGINE_RESTARTS="1") as engine:
        for count in (1, 2):
            engine.wait_for("ready")
            engine.one("engine_double.py core").kill()
            wait_until("the next restart", lambda expected=count: engine.status().get("restarts") == expected)
        assert engine.wait_for("failed")["ready"] is False


def test_a_child_that_ignores_sigterm_is_killed_in_the_end(tmp_path: Path) -> None:
    with with_double(tmp_path, ENGINE_DRAIN_SECONDS="0") as engine:
        engine.wait_for("ready")
        control(engine, term="ignore")
        engine.process.send_signal(signal.SIGTERM)
        assert engine.wait_for("stopping")["ready"] is False
        assert engine.stop() == 0  # the second signal hurries
        assert engine.family() == []


def test_stopping_while_starting(tmp_path: Path) -> None:
    engine = with_double(tmp_path)
    control(engine, start="never")
    with engine:
        wait_until("the double to run", lambda: engine.status().get("phase") == "weights")
        assert engine.stop() == 0
        assert engine.family() == []
