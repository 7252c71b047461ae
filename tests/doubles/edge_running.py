"""A real nginx with the rendered configuration on free ports, in front of `edge_upstream`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from services.init import certificate, nginx_conf

from tests.doubles.ports import accepts, free_ports
from tests.doubles.waiting import PATIENCE, wait_until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed on this machine (apt-get install nginx)")


def nginx_version() -> tuple[nginx_conf.Version, nginx_conf.Version]:
    """The versions of the nginx here and of its OpenSSL."""
    assert NGINX is not None
    told = subprocess.run([NGINX, "-V"], capture_output=True, text=True, check=True).stderr
    return nginx_conf.parse_version(told.splitlines()[0]), nginx_conf.openssl_version(told)


@dataclasses.dataclass
class Upstream:
    """The process behind nginx."""

    process: subprocess.Popen[str]
    port: int = 0
    _lines: queue.Queue[str] = dataclasses.field(default_factory=queue.Queue)

    def listen(self) -> None:
        """Take what it prints, until it ends. In a thread: a pipe that is read by lines cannot be asked whether there are more."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def next_line(self, seconds: float = PATIENCE) -> str:
        """What it prints next; empty when nothing comes in time."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""


@dataclasses.dataclass
class Edge:
    """A running edge: where it listens and what it writes."""

    folder: Path
    settings: nginx_conf.Edge
    process: subprocess.Popen[bytes]
    upstream: Upstream
    https: int
    http: int
    status: int

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.https}"

    def trust(self) -> ssl.SSLContext:
        """A client's context that trusts exactly this edge."""
        return ssl.create_default_context(cafile=str(self.folder / "certificates" / certificate.CHAIN))

    def client(self, http2: bool = False, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.trust(), http2=http2, timeout=PATIENCE, **more)

    def access_log(self) -> list[dict[str, Any]]:
        """The whole access log; every line must be JSON."""
        return [json.loads(line) for line in self.access_lines()]

    def access_lines(self) -> list[str]:
        """Its whole lines so far; one that is just being written is left for the next look."""
        path = self.folder / "access.log"
        return path.read_text().split("\n")[:-1] if path.exists() else []

    def logged(self, request_id: str) -> dict[str, Any]:
        """The log line of one call, once it is written."""

        def found() -> dict[str, Any] | None:
            lines = [line for line in self.access_log() if line["request_id"] == request_id]
            return lines[0] if lines else None

        return wait_until(f"the log line of {request_id}", found)

    def reload(self) -> None:
        """As start.sh does after a change."""
        self.process.send_signal(1)  # SIGHUP


@contextlib.contextmanager
def upstream(port: int = 0) -> Iterator[Upstream]:
    """The double as a process."""
    program = Path(__file__).with_name("edge_upstream.py")
    process = subprocess.Popen(
        [sys.executable, str(program), str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    running = Upstream(process)
    listener = threading.Thread(target=running.listen)
    listener.start()
    try:
        running.port = int(running.next_line())
        yield running
    finally:
        process.kill()
        listener.join()
        process.communicate()


@contextlib.contextmanager
def edge(folder: Path, user: int | None = None, **settings: Any) -> Iterator[Edge]:
    """nginx in front of the double, as `user` if told; `settings` override `nginx_conf.Edge`'s fields."""
    assert NGINX is not None
    https, http, status = free_ports(3)
    for name in ("run", "certificates", "own"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ends = certificate.install(folder / "own", folder / "certificates", ("edge.test",)).ends
    with upstream() as behind:
        described = nginx_conf.Edge(
            **{
                "gateway": f"127.0.0.1:{behind.port}",
                "resolver": None,
                "run": str(folder / "run"),
                "access_log": str(folder / "access.log"),
                "https_listen": f"127.0.0.1:{https}",
                "http_listen": f"127.0.0.1:{http}",
                "status_listen": f"127.0.0.1:{status}",
                "https_port": https,
                "chain": str(folder / "certificates" / certificate.CHAIN),
                "key": str(folder / "certificates" / certificate.KEY),
                "certificate_ends": ends.timestamp(),
                **settings,
            }
        )
        config = folder / "nginx.conf"
        config.write_text(nginx_conf.render(described, *nginx_version()))
        for path in (folder, *folder.parents):
            if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077 == 0:
                path.chmod(0o711)  # workers of a root nginx run as another user
        tested = subprocess.run([NGINX, "-t", "-q", "-c", config], capture_output=True, text=True, check=False)
        assert tested.returncode == 0, tested.stderr
        for path in (folder, *folder.rglob("*")) if user is not None else ():
            os.chown(path, user, user)
        with (folder / "error.log").open("wb") as errors:
            identity: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": []}
            process = subprocess.Popen([NGINX, "-c", config, "-p", folder], stderr=errors, **identity)
        try:
            wait_until("nginx listens", lambda: accepts(https))
            yield Edge(folder, described, process, behind, https, http, status)
        finally:
            process.terminate()
            process.wait(PATIENCE)
