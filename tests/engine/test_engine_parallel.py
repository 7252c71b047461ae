"""Tensor parallelism for real, on CPU: two workers share a tiny model; each process in turn is stopped or killed.

The long form of test_engine_faults.py. What each took is printed (`pytest -rP`) and recorded in docs/proofs.md.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest
from tests.doubles.waiting import wait_until
from tests.engine.conftest import START_SECONDS, RealEngine, real
from tests.engine.test_engine_faults import HANG_SECONDS, check_hang, held, vllm_processes
from tests.engine.test_engine_real import ask, tiny_model

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
TITLES = {"core": "VLLM::EngineCore", "first worker": "VLLM::Worker_TP0", "second worker": "VLLM::Worker_TP1"}


@pytest.fixture(scope="module")
def pair(built: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """An engine of two workers."""
    folder = tmp_path_factory.mktemp("pair")
    places = {"MODEL_NAME": str(tiny_model("llama", built, folder)), "SERVED_MODEL_NAME": RealEngine.model}
    with real(folder / "run", built, TP_SIZE="2", ENGINE_HANG_SECONDS=HANG_SECONDS, **places) as running:
        started = time.monotonic()
        running.ready()
        print(f"\nready after {time.monotonic() - started:.0f} s: {running.status()['phase_seconds']}")
        yield running


def process(engine: RealEngine, role: str) -> psutil.Process:
    """vLLM's process of that role."""
    if role == "api server":
        return vllm_processes(engine)["api"]
    return engine.one(TITLES[role])


def check_answers(engine: RealEngine) -> None:
    assert ask(engine, "/v1/completions", {"prompt": "a", "max_tokens": 1})["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("role", ["core", "first worker", "second worker", "api server"])
def test_whoever_is_stopped(pair: RealEngine, role: str) -> None:
    pair.ready()
    check_hang(pair, process(pair, role))
    check_answers(pair)


@pytest.mark.parametrize("role", ["api server", "core", "first worker", "second worker"])
def test_whoever_is_killed(pair: RealEngine, role: str) -> None:
    pair.ready()
    restarts, family, memory = pair.status()["restarts"], pair.family(), held(pair)
    victim = process(pair, role)
    victim.kill()
    killed = time.monotonic()
    wait_until("not ready", lambda: pair.get("/ready")[0] == 503)
    noticed = time.monotonic() - killed
    wait_until("a restart", lambda: pair.status()["restarts"] == restarts + 1)
    pair.wait_for("ready", START_SECONDS)
    print(f"\n{role} killed: noticed after {noticed:.1f} s, back after {time.monotonic() - killed:.0f} s")
    assert noticed < 40
    old = [process for process in family if process.pid != pair.process.pid]
    wait_until("nobody is left of the old ones", lambda: not [one for one in old if one.is_running()])
    assert pair.zombies() == []
    assert memory & set(os.listdir("/dev/shm")) - held(pair) == set()
    check_answers(pair)


def test_a_killed_supervisor_leaves_nobody_and_the_next_one_serves(pair: RealEngine) -> None:
    pair.ready()
    family, memory = pair.family(), held(pair)
    assert memory, "vLLM's processes talk over shared memory: an empty set would prove nothing"
    assert pair.process is not None
    pair.process.kill()
    killed = time.monotonic()
    pair.process.wait()
    wait_until("everyone to be gone", lambda: not [p for p in family if p.is_running()])
    gone = time.monotonic() - killed
    assert memory & set(os.listdir("/dev/shm")) == set()
    pair.start().ready()
    print(
        f"\nsupervisor killed: family gone after {gone:.1f} s, the next one ready after {time.monotonic() - killed:.0f} s"
    )
    check_answers(pair)


def test_sigterm_leaves_nobody(pair: RealEngine) -> None:
    """The last one here."""
    pair.ready()
    memory = held(pair)
    assert pair.stop() == 0
    assert pair.family() == []
    assert memory & set(os.listdir("/dev/shm")) == set()
