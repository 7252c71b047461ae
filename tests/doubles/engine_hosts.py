"""Two hosts on one machine: a network namespace each, a wire between them, and `engine` inside. Needs root and `ip`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.doubles.engine_running import ENGINE, ROOT
from tests.doubles.waiting import PATIENCE, wait_until

TOKEN = "a-token-that-the-machines-share-0123456789"
PORT, STATUS = 8000, 8001  # of the namespaces' own
_GET = """
import sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=20) as answer: print(answer.status, answer.read().decode(), end="")
except urllib.error.HTTPError as refused: print(refused.code, refused.read().decode(), end="")
except OSError: print(0, end="")
"""


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def command_line(pid: int) -> str:
    """Empty when it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def end(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Host:
    """One namespace with an address, and at most one `engine` in it."""

    def __init__(self, name: str, address: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.address = name, address
        folder.mkdir(parents=True)
        self.log = folder / "log.txt"
        temporary = Path("/tmp") / f"ray-{name}"  # sockets' paths must be short
        temporary.mkdir(exist_ok=True)
        self.environment = {
            "HOME": os.environ["HOME"],
            "ENGINE_STATE_DIR": str(folder / "state"),
            "RAY_NODE_ADDRESS": address,
            "RAY_TMPDIR": str(temporary),
            **environment,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """`words` inside."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words],
                env={**self.environment, **environment}, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start(self, verb: str, **environment: str) -> None:
        self.process = self.command(str(ENGINE), verb, **environment)

    def ask(self, path: str, port: int = STATUS) -> tuple[int, str]:
        """Status and body of a page inside; (0, "") when nobody listens."""
        words = ["ip", "netns", "exec", self.name, sys.executable, "-S", "-c", _GET, f"http://127.0.0.1:{port}{path}"]
        code, _, body = subprocess.run(words, check=True, capture_output=True, text=True).stdout.partition(" ")
        return int(code), body

    def status(self) -> dict[str, Any]:
        code, body = self.ask("/status")
        return json.loads(body) if code == 200 else {"state": "gone", "line": "", "restarts": 0}

    def wait(self, what: str, holds: Any, seconds: float = 3 * PATIENCE) -> dict[str, Any]:
        """The first status for which `holds`."""

        def there() -> dict[str, Any] | None:
            status = self.status()
            return status if holds(status) else None

        try:
            found: dict[str, Any] = wait_until(f"{self.name}: {what}", there, seconds)
        except AssertionError as late:
            raise AssertionError(f"{late}; status {self.status()}; log {self.log.read_text()[-3000:]}") from None
        return found

    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self, part: str) -> None:
        """Kill -9 whoever has `part` in its command line."""
        found = [pid for pid in self.pids() if part in command_line(pid)]
        assert found, part
        for pid in found:
            end(pid)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(2 * PATIENCE)


class Hosts:
    """A first and a second host. A context manager; at its end nobody is left in either."""

    def __init__(self, folder: Path, python: Path, environment: dict[str, str]) -> None:
        """`python`: the one that has Ray and vLLM, or a stand-in for it."""
        tag = f"{os.getpid() % 100000}"
        self._names = (f"a{tag}", f"b{tag}")
        tools = folder / "bin"
        tools.mkdir(parents=True)
        (tools / "nvidia-smi").write_text("#!/bin/sh\necho 24576\n")
        (tools / "nvidia-smi").chmod(0o755)
        common = {
            "PATH": f"{tools}:{os.environ['PATH']}", "VLLM_PYTHON": str(python), "ENGINE_DEVICE": "gpu",
            "DISTRIBUTED_EXECUTOR": "ray", "ENGINE_NODES": "2", "TP_SIZE": "1", "PP_SIZE": "2", "RAY_TOKEN": TOKEN,
            "RAY_HEAD_ADDRESS": "10.213.7.1", **environment,
        }  # fmt: skip
        self.head = Host(self._names[0], "10.213.7.1", folder / "head", common)
        self.other = Host(self._names[1], "10.213.7.2", folder / "other", common)

    def __enter__(self) -> Self:
        first, second = self._names
        for name in self._names:
            ip("netns", "add", name)
        ip("link", "add", f"v{first}", "netns", first, "type", "veth", "peer", "name", f"v{second}", "netns", second)
        for host in (self.head, self.other):
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", f"v{host.name}")
            ip("-n", host.name, "link", "set", "lo", "up")
            ip("-n", host.name, "link", "set", f"v{host.name}", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + PATIENCE
        for host in (self.head, self.other):
            while (pids := host.pids()) and time.monotonic() < deadline:
                for pid in pids:
                    end(pid)
                time.sleep(0.02)
            if host.process is not None:
                host.process.wait(PATIENCE)
            ip("netns", "del", host.name)
            shutil.rmtree(f"/tmp/ray-{host.name}", ignore_errors=True)
