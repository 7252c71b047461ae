"""A real vLLM hung, killed and drained: seen, written down, back by itself, and nobody left behind."""

from __future__ import annotations

import contextlib
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
from tests.doubles.engine_running import command_line
from tests.doubles.waiting import wait_until
from tests.engine.conftest import START_SECONDS, RealEngine, real
from tests.engine.test_engine_real import ask

HANG_SECONDS = "15"
NOTICE_SECONDS = 60  # it takes about 20 on a machine with nothing else to do
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def victim(built: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """An engine for these tests alone."""
    with real(tmp_path_factory.mktemp("victim"), built, ENGINE_HANG_SECONDS=HANG_SECONDS) as running:
        yield running


def vllm_processes(engine: RealEngine) -> dict[str, psutil.Process]:
    """vLLM's processes by role."""
    roles = {"core": "VLLM::EngineCore", "worker": "VLLM::Worker", "api": "vllm.entrypoints.openai.api_server"}
    found = {}
    for process in engine.family():
        title = command_line(process)
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
        wait_until("the call to be inside", lambda: engine.metric("engine_calls") >= 1 or call.done())
        assert not call.done()
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until("not ready", lambda: engine.get("/ready")[0] == 503)
        noticed = time.monotonic() - stopped
        assert isinstance(call.exception(60), urllib.error.URLError | ConnectionError | OSError)
    assert noticed < NOTICE_SECONDS
    engine.wait_for("ready", START_SECONDS)
    print(f"\n{process.pid} stopped: noticed after {noticed:.1f} s, back after {time.monotonic() - stopped:.0f} s")
    assert engine.metric('engine_restarts_total{reason="hung"}') == hangs + 1
    folder = engine.evidence()[-1]
    assert len(engine.evidence()) == before + 1
    states = {entry["pid"]: entry["state"] for entry in json.loads((folder / "processes.json").read_text())}
    assert states[process.pid] == "T"
    assert "EngineCore" in "".join(stack.read_text() for stack in folder.glob("stacks-*.txt"))
    old = [process for process in family if process.pid != engine.process.pid]
    wait_until("nobody is left of the old ones", lambda: not [one for one in old if one.is_running()])


def held(engine: RealEngine) -> set[str]:
    """Names of the shared memory and semaphores that this engine's processes have now, by inode."""
    mapped = set()
    for process in engine.family():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if " /dev/shm/" in line:
                    mapped.add(int(line.split()[4]))
    return {entry.name for entry in os.scandir("/dev/shm") if entry.inode() in mapped}


def test_a_stopped_core_under_load(victim: RealEngine) -> None:
    victim.ready()
    check_hang(victim, vllm_processes(victim)["core"])
    assert ask(victim, "/v1/completions", {"prompt": "a", "max_tokens": 1})["usage"]["completion_tokens"] == 1


def test_sigterm_lets_a_running_call_end(victim: RealEngine) -> None:
    """The last one here: it ends the engine."""
    victim.ready()
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "Once", "max_tokens": 150, "ignore_eos": True}
        call = pool.submit(ask, victim, "/v1/completions", body)
        wait_until("the call to be inside", lambda: victim.metric("engine_calls") >= 1 or call.done())
        assert not call.done()
        assert victim.stop() == 0
        assert call.result(60)["usage"]["completion_tokens"] == 150
    assert victim.family() == []
