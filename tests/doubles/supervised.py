"""The real engine on CPU under its real supervisor, on free ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.doubles.monitoring import fetch
from tests.doubles.ports import free_ports
from tests.doubles.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
VENV = Path(os.environ.get("ENGINE_VENV") or ROOT / ".state/engine-venv")
MODELS = Path(os.environ.get("MODEL_CACHE_DIR") or ROOT / ".state/models")
START_SECONDS = 300.0


@dataclass
class Supervised:
    """Where the engine and its supervisor answer."""

    url: str
    api_key: str
    status: str
    model: str
    process: subprocess.Popen[bytes]


@contextmanager
def supervised(folder: Path, model: str = "smol") -> Iterator[Supervised]:
    """Start `engine serve` and wait until it says that it is ready."""
    port, status = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")},
        "ENGINE_DEVICE": "cpu",
        "ENGINE_EAGER": "true",
        "ENGINE_VENV": str(VENV),
        "ENGINE_STATE_DIR": str(folder / "state"),
        "MODEL_CACHE_DIR": str(MODELS),
        "SERVED_MODEL_NAME": model,
        "MAX_MODEL_LEN": "1024",
        "VLLM_PORT": str(port),
        "ENGINE_STATUS_PORT": str(status),
        "VLLM_API_KEY": "engine-secret",
    }
    with (folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine", "serve"], env=environment, stdout=log, stderr=log, cwd=folder
        )
        try:

            def ready() -> bool:
                assert process.poll() is None, (folder / "engine.log").read_text()[-2000:]
                try:
                    return json.loads(fetch(f"http://127.0.0.1:{status}/status"))["state"] == "ready"
                except OSError:
                    return False

            wait_until("the engine is ready", ready, START_SECONDS)
            yield Supervised(f"http://127.0.0.1:{port}", "engine-secret", f"127.0.0.1:{status}", model, process)
        finally:
            process.terminate()
            process.wait(2 * PATIENCE)
