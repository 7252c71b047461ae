"""nginx/start.sh, as it runs in the container: it takes the right rendering and reloads what changed."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import signal
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from scripts.local.places import ROOT
from services.init import certificate, nginx_conf
from tests.doubles.edge_running import needs_nginx, nginx_version
from tests.doubles.ports import accepts, free_ports
from tests.doubles.waiting import wait_until

pytestmark = needs_nginx


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """As `init` leaves the volumes: a rendering for each range of versions, a certificate."""
    (tmp_path / "config").mkdir()
    os.chmod(tmp_path, 0o711)
    certificate.install(tmp_path / "none", tmp_path / "certificates", ("first.test",))
    return tmp_path


def rendered(folder: Path, https: int, status: int) -> None:
    edge = nginx_conf.Edge(
        gateway="127.0.0.1:9",
        resolver=None,
        run=str(folder),
        access_log=str(folder / "access.log"),
        https_listen=f"127.0.0.1:{https}",
        http_listen=f"unix:{folder}/http",
        status_listen=f"127.0.0.1:{status}",
        chain=str(folder / "certificates" / certificate.CHAIN),
        key=str(folder / "certificates" / certificate.KEY),
    )
    for version in nginx_conf.RENDERED_FOR:
        name = ".".join(map(str, version))
        text = nginx_conf.render(edge, version).replace("server_tokens off;", f"server_tokens off; # {name}")
        (folder / "config" / f"nginx-{name}.conf").write_text(text)


def test_it_serves_and_takes_over_a_new_certificate(folder: Path) -> None:
    """On a busy machine, too: whatever looks at the files is slow, and the change comes as soon as nginx listens."""
    https, status = free_ports(2)
    rendered(folder, https, status)
    slow = folder / "slow"
    slow.mkdir()
    (slow / "cat").write_text('#!/bin/sh\nsleep 0.7\nexec /bin/cat "$@"\n')
    (slow / "cat").chmod(0o755)
    environment = {
        "PATH": f"{slow}:{os.environ['PATH']}:/usr/sbin",
        "EDGE_CONFIG": str(folder / "config"),
        "EDGE_CERTIFICATES": str(folder / "certificates"),
    }
    process = subprocess.Popen(["/bin/sh", ROOT / "nginx/start.sh"], env=environment, start_new_session=True)
    try:
        expected = [v for v in nginx_conf.RENDERED_FOR if v <= nginx_version()[0]][-1]
        name = f"nginx-{'.'.join(map(str, expected))}.conf"
        command = Path(f"/proc/{process.pid}/cmdline")  # start.sh becomes nginx
        wait_until(f"nginx listens with {name}", lambda: name in command.read_text() and accepts(https))
        chain, key = certificate.self_signed(("second.test",), dt.datetime.now(dt.UTC))
        own = folder / "own"
        own.mkdir()
        (own / certificate.CHAIN).write_bytes(chain)
        (own / certificate.KEY).write_bytes(key)
        certificate.install(own, folder / "certificates", ())

        def taken_over() -> bool:
            context = ssl.create_default_context(cafile=str(folder / "certificates" / certificate.CHAIN))
            try:
                with httpx.Client(verify=context) as client:
                    return client.get(f"https://localhost:{https}/nothing").status_code == 404
            except httpx.TransportError:
                return False

        wait_until("the new certificate is served", taken_over)
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the watching loop; its sleep would end it at the next turn


def test_without_a_rendering_for_this_nginx_it_says_so(folder: Path) -> None:
    https, status = free_ports(2)
    rendered(folder, https, status)
    for path in (folder / "config").iterdir():
        shutil.move(path, path.with_name("nginx-99.0.0.conf"))
    done = subprocess.run(
        ["/bin/sh", ROOT / "nginx/start.sh"],
        env={"PATH": f"{os.environ['PATH']}:/usr/sbin", "EDGE_CONFIG": str(folder / "config")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no configuration for nginx" in done.stderr
