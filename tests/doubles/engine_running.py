"""`engine serve` as a process, with the double or with the real vLLM, seen from outside."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from tests.doubles.ports import free_ports
from tests.doubles.waiting import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
ENGINE = Path(sys.executable).parent / "engine"


def command_line(process: psutil.Process) -> str:
    """Its command line, or the title that it gave itself; empty when it is no more."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline()) or process.name()
    return ""


class RunningEngine:
    """One `engine serve`; `environment` adds to what it needs. Use as a context manager."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port, self.status_port = free_ports(2)
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self.environment = {
            **kept,
            "VLLM_PORT": str(self.port),
            "ENGINE_STATUS_PORT": str(self.status_port),
            "ENGINE_STATE_DIR": str(folder / "state"),
            **environment,
        }
        self.log = folder / "log.txt"
        self.before: list[str] = []  # a program that runs `engine`, if not directly
        self.process: subprocess.Popen[bytes] | None = None
        self._sessions: set[int] = set()

    def start(self) -> RunningEngine:
        """Start it; it need not be ready."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.before, ENGINE, "serve"],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __enter__(self) -> RunningEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()  # the guard must then end all the rest
            self.process.wait()
        wait_until("the guard ends all that the supervisor left", lambda: not self.family())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page of the supervisor; (0, "") when it does not listen."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            with refused:
                return refused.code, refused.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""

    def status(self) -> dict[str, Any]:
        code, body = self.get("/status")
        return json.loads(body) if code == 200 else {"state": "gone", "ready": False, "restarts": None}

    def wait_for(self, state: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """The status once the engine is in `state`."""

        def there() -> dict[str, Any] | None:
            status = self.status()
            return status if status["state"] == state else None

        try:
            found: dict[str, Any] = wait_until(f"state {state}", there, seconds)
        except AssertionError as late:
            raise AssertionError(f"{late}; status {self.status()}; log {self.log.read_text()[-3000:]}") from None
        return found

    def metric(self, line: str) -> float:
        """The value of one series, written as in the exposition; waits until there is one."""

        def told() -> str | None:
            lines = self.get("/metrics")[1].splitlines()
            return next((found for found in lines if found.startswith(line + " ")), None)

        found: str = wait_until(f"{line} in /metrics", told)
        return float(found.rpartition(" ")[2])

    def family(self) -> list[psutil.Process]:
        """All living processes of this engine: of its sessions, or with its state folder in their environment.

        vLLM's workers write their title over their environment, so the sessions once seen are remembered.
        """
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if process.status() != psutil.STATUS_ZOMBIE:
                    processes.append((process, os.getsid(process.pid), self._is_marked(process)))
        self._sessions |= {session for process, session, marked in processes if marked and process.pid == session}
        return [process for process, session, marked in processes if marked or session in self._sessions]

    def _is_marked(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error):
            theirs = process.environ()
            marks = {theirs.get("ENGINE_STATE_DIR"), str(Path(theirs.get("PYTHONPATH", "-")).parent)}
            return self.environment["ENGINE_STATE_DIR"] in marks
        return False

    def one(self, part: str) -> psutil.Process:
        """The one process whose command line or name contains `part`."""

        def alone() -> psutil.Process | None:
            found = [p for p in self.family() if part in command_line(p)]
            return found[0] if len(found) == 1 else None  # one that was just forked bears its parent's for a moment

        process: psutil.Process = wait_until(f"exactly one {part}", alone)
        return process

    def shared(self) -> list[str]:
        """Names under /dev/shm of this engine's double: its memory and its semaphore."""
        mark = hashlib.sha256(self.environment["DOUBLE_CONTROL"].encode()).hexdigest()[:12]
        return sorted(name for name in os.listdir("/dev/shm") if f"double_{mark}_" in name)

    def zombies(self) -> list[psutil.Process]:
        """Dead children that nobody has collected, below the supervisor."""
        assert self.process is not None
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if process.status() == psutil.STATUS_ZOMBIE]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the supervisor and wait; its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(2 * PATIENCE)

    def evidence(self) -> list[Path]:
        folder = Path(self.environment["ENGINE_STATE_DIR"]) / "evidence"
        return sorted(folder.iterdir()) if folder.is_dir() else []


def with_double(folder: Path, **environment: str) -> RunningEngine:
    """`engine serve` over the double; write `folder/control.json` to make it misbehave."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "vllm-python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/doubles/engine_double.py "$@"\n')
    program.chmod(0o755)
    model = folder / "models" / "double"
    model.mkdir(parents=True, exist_ok=True)
    (model / ".complete").write_text("")
    (model / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 128})
    )
    return RunningEngine(
        folder,
        {
            "VLLM_PYTHON": str(program),
            "ENGINE_DEVICE": "cpu",
            "MODEL_NAME": "double",
            "MODEL_CACHE_DIR": str(folder / "models"),
            "DOUBLE_CONTROL": str(folder / "control.json"),
            "ENGINE_HANG_SECONDS": "4",
            "ENGINE_CANARY_SECONDS": "0.5",
            **environment,
        },
    )


def control(engine: RunningEngine, **settings: Any) -> None:
    """Change what the double does from now on."""
    target = engine.folder / "control.json"
    target.with_suffix(".new").write_text(json.dumps(settings))
    shutil.move(target.with_suffix(".new"), target)
