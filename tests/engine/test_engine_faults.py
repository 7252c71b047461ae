"""A real vLLM hung, killed and drained: seen, written down, back by itself, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tests.doubles.engine_running import until
from tests.engine.conftest import START_SECONDS, RealEngine, real
from tests.engine.test_engine_real import ask, tiny_model

NOTICE_SECONDS = 20
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def victim(built: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """An engine for these tests alone."""
    with real(tmp_path_factory.mktemp("victim"), built) as running:
        yield running


def vllm_processes(engine: RealEngine) -> dict[str, psutil.Process]:
    """vLLM's processes by role."""
    roles = {"core": "VLLM::EngineCore", "worker": "VLLM::Worker", "api": "vllm.entrypoints.openai.api_server"}
    found = {}
    for process in engine.family():
        title = " ".join(process.cmdline())
        for role, mark in roles.items():
            if title.startswith(mark) or (role == "api" and mark in title and "engine.guard" not in title):
                found.setdefault(role, process)
    return found


def long_call(engine: RealEngine) -> int:
    return int(
        ask(engine, "/v1/completions", {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True})["usage"][
            "completion_tokens"
        ]
    )


def check_hang(engine: RealEngine, process: psutil.Process) -> None:
    """Stop one process under load; everything that must follow."""
    hangs, before = engine.metric('engine_restarts_total{reason="hung"}'), len(engine.evidence())
    family = engine.family()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(long_call, engine)
        until("the call to be inside", lambda: engine.metric("engine_calls") >= 1 or call.done(), 30)
        assert not call.done()
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        until("not ready", lambda: engine.get("/ready")[0] == 503, 60)
        noticed = time.monotonic() - stopped
        assert isinstance(call.exception(60), urllib.error.URLError | ConnectionError | OSError)
    assert noticed < NOTICE_SECONDS
    engine.wait_for("ready", START_SECONDS)
    assert engine.metric('engine_restarts_total{reason="hung"}') == hangs + 1
    folder = engine.evidence()[-1]
    assert len(engine.evidence()) == before + 1
    states = {entry["pid"]: entry["state"] for entry in json.loads((folder / "processes.json").read_text())}
    assert states[process.pid] == "T"
    assert "EngineCore" in "".join(stack.read_text() for stack in folder.glob("stacks-*.txt"))
    assert [old for old in family if old.is_running() and old.pid != engine.process.pid] == []


def check_kill(engine: RealEngine, process: psutil.Process) -> None:
    """Kill one process; everything that must follow."""
    restarts = engine.status()["restarts"]
    family, memory = engine.family(), set(os.listdir("/dev/shm"))
    process.kill()
    until("a restart", lambda: engine.status()["restarts"] == restarts + 1, 60)
    engine.wait_for("ready", START_SECONDS)
    assert [old for old in family if old.is_running() and old.pid != engine.process.pid] == []
    assert engine.zombies() == []
    ours = held(engine)
    assert {name for name in set(os.listdir("/dev/shm")) & memory if name not in ours} <= others(engine, memory)


def held(engine: RealEngine) -> set[str]:
    """Shared memory that this engine's processes have now."""
    names = set()
    for process in engine.family():
        for mapped in process.memory_maps(grouped=True):
            if mapped.path.startswith("/dev/shm/"):
                names.add(Path(mapped.path).name)
    return names


def others(engine: RealEngine, memory: set[str]) -> set[str]:
    """Of `memory`, what processes of somebody else hold: not ours to clear."""
    ours = {process.pid for process in engine.family()}
    names = set()
    for process in psutil.process_iter():
        if process.pid not in ours:
            try:
                names |= {
                    Path(m.path).name for m in process.memory_maps(grouped=True) if m.path.startswith("/dev/shm/")
                }
            except psutil.Error:
                continue
    return names & memory


def test_a_stopped_core_under_load(victim: RealEngine) -> None:
    victim.ready()
    check_hang(victim, vllm_processes(victim)["core"])
    assert ask(victim, "/v1/completions", {"prompt": "a", "max_tokens": 1})["usage"]["completion_tokens"] == 1


@pytest.mark.long
@pytest.mark.parametrize("role", ["api", "core", "worker"])
def test_whoever_is_killed(victim: RealEngine, role: str) -> None:
    victim.ready()
    check_kill(victim, vllm_processes(victim)[role])


@pytest.mark.long
@pytest.mark.parametrize("role", ["api", "worker"])
def test_whoever_is_stopped(victim: RealEngine, role: str) -> None:
    victim.ready()
    check_hang(victim, vllm_processes(victim)[role])


@pytest.mark.long
def test_a_supervisor_killed_leaves_nobody_and_starts_again(victim: RealEngine) -> None:
    victim.ready()
    family = victim.family()
    names = held(victim)
    assert victim.process is not None
    victim.process.kill()
    victim.process.wait()
    until("everyone to be gone", lambda: not [p for p in family if p.is_running()], 30)
    assert names & set(os.listdir("/dev/shm")) == set()
    victim.start().ready()


def test_sigterm_lets_a_running_call_end(victim: RealEngine) -> None:
    """The last one here: it ends the engine."""
    victim.ready()
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "Once", "max_tokens": 150, "ignore_eos": True}
        call = pool.submit(ask, victim, "/v1/completions", body)
        until("the call to be inside", lambda: victim.metric("engine_calls") >= 1 or call.done(), 30)
        assert not call.done()
        assert victim.stop() == 0
        assert call.result(5)["usage"]["completion_tokens"] == 150
    assert victim.family() == []


@pytest.mark.long
def test_two_workers_share_a_model_and_one_hangs(built: dict[str, str], tmp_path: Path) -> None:
    """Tensor parallelism for real, on CPU: with one worker stopped vLLM's health is 200, and the hang is seen."""
    model = tiny_model("llama", built, tmp_path)
    places = {"MODEL_NAME": str(model), "SERVED_MODEL_NAME": RealEngine.model, "TP_SIZE": "2"}
    with real(tmp_path / "run", built, **places) as engine:
        engine.ready()
        workers = [p for p in engine.family() if " ".join(p.cmdline()).startswith("VLLM::Worker_TP")]
        assert len(workers) == 2
        check_hang(engine, workers[1])
        assert engine.stop() == 0
