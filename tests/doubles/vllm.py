"""Starts the vLLM double as a process and talks to its `/double/*` routes.

with VllmDouble(api_key="k") as engine:
    engine.url, engine.state(), engine.requests(), engine.fault("die_after=3", times=2)
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from tests.doubles.waiting import PATIENCE, wait_until

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0


class VllmDouble:
    """One double. Options are the server's long options: `pace_ms=20`, `alias=["a", "b"]`, `max_num_seqs=4`."""

    def __init__(self, **options: Any) -> None:
        self.model = str(options.get("model", "double"))
        self.api_key = options.get("api_key")
        self._argv = [sys.executable, "-m", "tests.doubles.vllm_server"]
        for name, value in options.items():
            for one in value if isinstance(value, list) else [value]:
                self._argv.append(f"--{name.replace('_', '-')}={one}")
        self.port = int(options.get("port", 0))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base URL, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start, or start again on the same port after `kill`; returns when it listens."""
        wait_until("the vLLM double listens", self._started, START_SECONDS)
        return self

    def _started(self) -> bool:
        """Whether it came up. A port that it had before may be somebody's near end of a connection for a moment."""
        argv = [*self._argv, *([f"--port={self.port}"] if self.port else [])]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        )
        stdout = self.process.stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], START_SECONDS)
        line = stdout.readline() if ready else b""
        if not line:
            self.stop()
            if not self.port:
                raise RuntimeError("the vLLM double did not start; its error output says why")
            return False
        self.port = json.loads(line)["listening"]
        return True

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after five seconds."""
        if self.process is None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def kill(self) -> None:
        """SIGKILL, as when the engine crashes."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None

    def signal(self, number: int) -> None:
        """Send a signal, e.g. SIGSTOP for a hang of the whole process."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def call(self, path: str, body: Any = None) -> Any:
        """GET or POST JSON, with the key, on a connection of its own."""
        headers = {"content-type": "application/json", "connection": "close"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, payload, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def state(self) -> dict[str, Any]:
        """`running`, `waiting`, `most_running`, `prompt_tokens`, `generation_tokens`, `requests`."""
        return self.call("/double/state")

    def requests(self) -> list[dict[str, Any]]:
        """All requests so far; fields as in `vllm_engine.Record`."""
        return self.call("/double/requests")

    def fault(self, fault: str, times: int = 1) -> None:
        """Queue a directive for the next requests that carry none."""
        self.call("/double/fault", {"fault": fault, "times": times})

    def go_on(self) -> None:
        """Let one stream go on that waits by `wait_after`, or soon will."""
        self.call("/double/go", {})

    def health(self, status: int) -> None:
        """What `/health` answers from now on."""
        self.call("/double/health", {"status": status})

    def wait_idle(self, seconds: float = PATIENCE) -> float:
        """Wait until nothing runs or waits; returns the seconds it took."""
        began = time.monotonic()
        wait_until("the engine is idle", lambda: not (s := self.state())["running"] and not s["waiting"], seconds)
        return time.monotonic() - began

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
