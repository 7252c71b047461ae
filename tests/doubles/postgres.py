"""A real PostgreSQL of its own: a temporary cluster on a unix socket, started and stopped by the test.

As root the server runs as another user, because it refuses to be root. Debian's package is `postgresql`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.doubles.waiting import PATIENCE, wait_until


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`, newest version first; None if this machine has no PostgreSQL."""
    found = [Path(path).parent for path in sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)]
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path).resolve().parent)
    return next((folder for folder in found if (folder / "postgres").exists()), None)


class Postgres:
    """One cluster. `url` is a DATABASE_URL."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        # A short path: a unix socket's may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
        self._as_other = os.geteuid() == 0
        if self._as_other:
            shutil.chown(self.folder, "nobody")
        self.process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "gateway", "-A", "trust", "--no-sync", "-E", "UTF8")

    def _argv(self, program: str, *arguments: str) -> list[str]:
        user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"] if self._as_other else []
        return [*user, str(self._binaries / program), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            self._argv(program, *arguments), check=True, capture_output=True, cwd=self.folder, timeout=2 * PATIENCE
        )

    def start(self) -> None:
        """Start the server; returns when it takes connections."""
        settings = [
            "-c",
            "listen_addresses=",
            "-c",
            f"unix_socket_directories={self.folder}",
            "-c",
            "shared_buffers=16MB",
        ]
        log = (self.folder / "log").open("ab")
        with log:
            self.process = subprocess.Popen(
                self._argv("postgres", "-D", str(self.folder / "data"), *settings),
                stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip
        wait_until("PostgreSQL takes connections", self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise RuntimeError((self.folder / "log").read_text()[-2000:])
        import psycopg

        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._url("postgres"), connect_timeout=10):
            return True
        return False

    def _url(self, database: str) -> str:
        return f"postgresql://gateway@/{database}?host={self.folder}"

    def database(self) -> str:
        """A new empty database; its URL."""
        import psycopg

        self._databases += 1
        name = f"test{self._databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self._url(name)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop the server: at once but cleanly, or with another signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(PATIENCE)
        self.process = None

    def pause(self) -> None:
        """The whole server stands still: sockets stay open, nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on where it stood."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in [self.process.pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):  # a session that has just ended
                os.kill(pid, number)

    def close(self) -> None:
        """Stop and remove everything."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running cluster. Raises `LookupError` when this machine has no PostgreSQL."""
    binaries = programs()
    if binaries is None:
        raise LookupError("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    cluster = Postgres(binaries)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
