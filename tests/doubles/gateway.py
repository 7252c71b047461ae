"""Starts the real gateway as a process with an environment of its own, and reads its log lines.

with GatewayProcess(VLLM_URL=engine.url, GATEWAY_API_KEYS="team=sk-team-secret") as gateway:
    gateway.url, gateway.post("/v1/chat/completions", {...}, key="sk-team-secret"), gateway.closed(request_id)
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from tests.doubles.machine import patience
from tests.doubles.vllm import wait_until

START_SECONDS = 30.0
KEY = "sk-test-0123456789abcdef"
ADMIN_KEY = "sk-admin-0123456789abcdef"


class Answer:
    """A whole answer: `status`, `headers` (lower-case names), `body` bytes; `json` parses it."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error code of an error answer."""
        return self.json["error"]["code"]


class GatewayProcess:
    """One gateway on a free port; its database is a file in a temporary folder unless DATABASE_URL says otherwise.

    Environment variables by name; None removes a default of this double. The log is kept in `lines`.
    """

    def __init__(self, **environment: str | int | float | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-")
        self.folder = Path(self._folder.name)
        defaults: dict[str, Any] = {
            "GATEWAY_PORT": 0,
            "GATEWAY_API_KEYS": f"test={KEY}",
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
            "DATABASE_URL": f"sqlite:///{self.folder}/gateway.sqlite3",
            "SPOOL_DIR": self.folder,
            "HEALTH_SECONDS": 0.2,
            "DRAIN_SECONDS": 5,
        }
        merged = {**defaults, **environment}
        self.environment = {name: str(value) for name, value in merged.items() if value is not None}
        self.lines: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._listening = threading.Event()

    @property
    def url(self) -> str:
        """Base URL, without a path."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, ready: bool = True) -> Self:
        """Start; returns when it listens and, unless `ready` is False, when `/ready` says 200."""
        base = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        self._listening.clear()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve"],
            env={**base, "PYTHONDONTWRITEBYTECODE": "1", **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        wait_until(
            "the gateway listens or ends",
            lambda: self._listening.is_set() or self.process.poll() is not None,
            patience(START_SECONDS),
        )  # type: ignore[union-attr]
        if not self._listening.is_set():
            self._reader.join(5)
            raise RuntimeError(
                f"the gateway did not start (exit {self.process.poll()}): {b''.join(self.raw)[-3000:]!r}"
            )
        if ready:
            wait_until("the gateway is ready", lambda: self.get("/ready").status == 200, patience(START_SECONDS))
        return self

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.raw.append(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            self.lines.append(record)
            if record.get("event") == "listening":
                self.port = record["port"]
                self._listening.set()
        process.stdout.close()

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; `start` starts it again on the same database."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def terminate(self, seconds: float = 15.0) -> int:
        """SIGTERM; returns the exit status."""
        assert self.process is not None
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self._reap()
            raise
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        status = self.process.wait()
        if self._reader is not None:
            self._reader.join(5)
        self.process = None
        return status

    def request(self, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str) -> Answer:
        """One request on a connection of its own; `body` is JSON, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            sent.setdefault("authorization", f"Bearer {key}")
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return Answer(answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, key: str | None = KEY, **headers: str) -> Answer:
        return self.request("GET", path, None, key, **headers)

    def post(self, path: str, body: Any, key: str | None = KEY, **headers: str) -> Answer:
        return self.request("POST", path, body, key, **headers)

    def admin(self, method: str, path: str, body: Any = None) -> Answer:
        """A request with the admin key."""
        return self.request(method, path, body, ADMIN_KEY)

    def chat(self, text: str = "hello", key: str | None = KEY, model: str = "double", **fields: Any) -> Answer:
        """One chat completion; `fields` go into the body."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self.post("/v1/chat/completions", body, key)

    def closed(self, request_id: str, seconds: float = 5.0) -> dict[str, Any]:
        """The `call_closed` line of a call; waits for it."""
        return wait_until(
            f"call_closed of {request_id}",
            lambda: next(
                (x for x in self.lines if x.get("event") == "call_closed" and x["request_id"] == request_id), None
            ),
            seconds,
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`gateway …` with the same environment, while it runs."""
        base = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR")}
        return subprocess.run(
            [sys.executable, "-m", "gateway", *arguments],
            env={**base, **self.environment},
            capture_output=True,
            text=True,
            timeout=30,
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.terminate()
        self._folder.cleanup()
