"""The site under the soak: nginx, the gateway with its log on disk and a fast wall clock, the journalled double."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.doubles import edge_running
from tests.doubles.gateway import ADMIN_KEY, GatewayProcess
from tests.doubles.wall_clock import WallClock
from tests.soak.engine import JournalledDouble

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-of-a-prompt"
RETENTION_DAYS = 2
HOLD_SECONDS = 900
SETTINGS: dict[str, Any] = {
    # Short, so that hangs come to their end within the run; a minute of real life is hours of the wall clock.
    "FIRST_BYTE_SECONDS": 4,
    "IDLE_SECONDS": 3,
    "KEEP_ALIVE_SECONDS": 1,
    "DRAIN_SECONDS": 3,
    "QUEUE_SECONDS": 5,
    "ENGINE_CONCURRENCY": 6,  # fewer than callers: some always wait
    "BREAKER_SECONDS": 1,
    "MAX_BODY_BYTES": 1_000_000,
    "DEFAULT_OUTPUT_TOKENS": 64,
    "USAGE_RETENTION_DAYS": RETENTION_DAYS,
    "QUOTA_TIMEZONE": "Europe/Berlin",
    "TRACE_RATIO": 0.1,
}


class Gateway(GatewayProcess):
    """Lives on one port over all its lives, and writes its log to a file instead of into this process."""

    def __init__(self, wall: WallClock, port: int, log: Path, **environment: Any) -> None:
        preload = {**wall.environment, "PYTHONPATH": str(ROOT / "services/gateway/src")}
        hold = HOLD_SECONDS * wall.factor
        super().__init__(
            GATEWAY_PORT=port, HOLD_SECONDS=hold, HOME=str(self_home(log)), **SETTINGS, **preload, **environment
        )
        self.log = log
        self.lives = 0

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self.lives += 1
        with self.log.open("ab", buffering=0) as log:
            for line in process.stdout:
                log.write(line)
                if b'"listening"' in line and (told := _json(line)).get("event") == "listening":
                    self.port = told["port"]
                    self._listening.set()
        process.stdout.close()

    def admin_json(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of an admin request."""
        answer = self.request(method, path, body, ADMIN_KEY)
        return answer.status, (answer.json if answer.body else None)


def self_home(log: Path) -> Path:
    """A home of the gateway's own: it must need nothing of the user's."""
    return log.parent


def _json(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        told: dict[str, Any] = json.loads(line)
        return told
    return {}


@dataclass
class Site:
    """Everything that runs. `state` is the folder that must stay small; `logs` are every log written."""

    wall: WallClock
    engine: JournalledDouble
    gateway: Gateway
    edge: edge_running.Edge
    state: Path
    folder: Path
    secrets: set[str] = field(default_factory=set)

    @property
    def logs(self) -> list[Path]:
        return [self.gateway.log, self.folder / "edge" / "access.log", self.folder / "edge" / "error.log"]

    def nginx_processes(self) -> list[int]:
        """The master and its children."""
        master = self.edge.process.pid
        with contextlib.suppress(OSError):
            told = Path(f"/proc/{master}/task/{master}/children").read_text().split()
            return [master, *map(int, told)]
        return [master]

    def leaks(self, readable: IO[bytes]) -> list[str]:
        """Secrets or prompts in a log."""
        found = []
        for number, line in enumerate(readable, 1):
            if CANARY.encode() in line:
                found.append(f"line {number}: a prompt")
            if b"sk-" in line and any(word in self.secrets for word in _words(line)):
                found.append(f"line {number}: a secret")
        return found


def _words(line: bytes) -> list[str]:
    text = line.decode("utf-8", "replace")
    return "".join(c if c.isalnum() or c in "-_" else " " for c in text).split()


@contextlib.contextmanager
def site(folder: Path, wall: WallClock, database: str | None = None) -> Iterator[Site]:
    """The whole site in `folder`; SQLite unless `database` (a DATABASE_URL) says otherwise."""
    folder.chmod(0o711)
    state, logs = folder / "state", folder / "logs"
    (state / "spool").mkdir(parents=True)
    logs.mkdir()
    url = database or f"sqlite:///{state}/gateway.sqlite3"
    (port,) = edge_running.free_ports(1)
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(
            JournalledDouble(folder / "journal", model="double", api_key="k-engine-soak", max_num_seqs=32)
        )
        gateway = Gateway(
            wall, port, logs / "gateway.log", VLLM_URL=engine.url, VLLM_API_KEY="k-engine-soak",
            DATABASE_URL=url, SPOOL_DIR=str(state / "spool"),
        )  # fmt: skip
        stack.callback(engine.signal, 18)
        edge = stack.enter_context(
            edge_running.edge(folder / "edge", gateway=f"127.0.0.1:{port}", workers=1, shutdown_seconds=5)
        )
        stack.enter_context(gateway)
        secrets = {ADMIN_KEY, "k-engine-soak", gateway.environment["GATEWAY_API_KEYS"].partition("=")[2]}
        yield Site(wall, engine, gateway, edge, state, folder, secrets)
