"""The way a client takes: TLS and nginx, with the appliance's own configuration, in front of this gateway."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

from services.init import certificate, nginx_conf
from tests.bench import load, machine
from tests.bench.machine import GATEWAY_CORE, Process

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def start(gateway: int, folder: Path) -> tuple[Process, int]:
    """nginx on the gateway's core, and its TLS port. Its limits of requests and connections are off."""
    assert NGINX is not None
    inside = folder / "edge"
    for name in ("run", "certificates", "own"):
        (inside / name).mkdir(parents=True)
    certificate.install(inside / "own", inside / "certificates", ("bench.test",))
    https, http, status = (machine.free_port() for _ in range(3))
    told = subprocess.run([NGINX, "-V"], capture_output=True, text=True, check=True).stderr
    edge = nginx_conf.Edge(
        gateway=f"127.0.0.1:{gateway}",
        resolver=None,
        run=str(inside / "run"),
        access_log=str(inside / "access.log"),
        https_listen=f"127.0.0.1:{https}",
        http_listen=f"127.0.0.1:{http}",
        status_listen=f"127.0.0.1:{status}",
        https_port=https,
        chain=str(inside / "certificates" / certificate.CHAIN),
        key=str(inside / "certificates" / certificate.KEY),
        requests_per_second=0,
        connections=0,
        workers=1,
    )
    versions = nginx_conf.parse_version(told.splitlines()[0]), nginx_conf.openssl_version(told)
    config = inside / "nginx.conf"
    config.write_text(nginx_conf.render(edge, *versions))
    for path in (*inside.rglob("*"), inside):
        path.chmod(0o777 if path.is_dir() else 0o644)  # workers of a root nginx run as another user
    process = Process("nginx", [NGINX, "-c", str(config), "-p", str(inside)], GATEWAY_CORE, inside)

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", https), 1):
            return True
        return process.popen.poll() is not None

    machine.wait_for("nginx listens", listens, 20)
    return process, https


def measure(
    target: load.Target, double: Process, process: Process, https: int, connections: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """JSON calls over TLS; the CPU of the gateway and of nginx for each."""
    edge = load.Target("edge", https, process, scheme="https")
    found: dict[str, Any] = {}
    for count in connections:
        before = target.process.cpu_seconds()
        taken = load.calls(edge, double, count, seconds)
        gateway = target.process.cpu_seconds() - before
        taken["gateway_us"] = gateway / max(1.0, taken["calls_s"] * seconds) * 1e6
        taken["others"] = max(0.0, taken["others"] - gateway / seconds)
        found[str(count)] = taken
    return found
