"""The real engine, started once for all tests that only ask it something: fixture `engine`.

`engine.url`, `engine.api_key` and `engine.model` are what a gateway needs. Tests that break an engine start their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doubles.engine_running import ROOT, RunningEngine

MODEL = "SmolLM2-135M-Instruct"
START_SECONDS = 1200  # a cold cache on a machine that does other things too
KEY = "engine-test-key"


class RealEngine(RunningEngine):
    """`engine serve` over vLLM's CPU build."""

    api_key = KEY
    model = MODEL

    def ready(self) -> RealEngine:
        """Wait until it is."""
        self.wait_for("ready", START_SECONDS)
        return self


@pytest.fixture(scope="session")
def built() -> dict[str, str]:
    """Where vLLM's CPU build and the embedded model lie, built if they are not there yet."""
    places = {
        "ENGINE_VENV": os.environ.get("ENGINE_VENV") or str(ROOT / ".state" / "engine-venv"),
        "MODEL_CACHE_DIR": os.environ.get("MODEL_CACHE_DIR") or str(ROOT / ".state" / "models"),
    }
    done = subprocess.run(
        [ROOT / "scripts" / "engine-cpu"],
        env={**os.environ, **places},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return places


def real(folder: Path, built: dict[str, str], **environment: str) -> RealEngine:
    """An engine that is not started yet; compiling is left out, since what is proven here does not need it, and a machine
    that does other things for a while is not taken for a hang."""
    secret = folder / "api-key"
    folder.mkdir(parents=True, exist_ok=True)
    secret.write_text(KEY + "\n")
    common = {"VLLM_API_KEY_FILE": str(secret), "ENGINE_EAGER": "true", "MAX_NUM_SEQS": "16"}
    common["ENGINE_HANG_SECONDS"] = "120"
    return RealEngine(folder, {**built, **common, **environment})


@pytest.fixture(scope="session")
def engine(built: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """A running, ready engine that nobody harms."""
    # Short steps: between two of them the engine looks at who has left, and on this CPU 2,048 tokens take many seconds.
    with real(tmp_path_factory.mktemp("engine"), built, MAX_NUM_BATCHED_TOKENS="64") as running:
        yield running.ready()
