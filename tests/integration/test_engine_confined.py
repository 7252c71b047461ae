"""Evidence of a hang as a hardened container allows it: no capabilities, no new privileges, ptrace refused or not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.doubles.engine_running import RunningEngine, command_line, with_double
from tests.doubles.waiting import wait_until

from engine import evidence, family


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that another user can reach, unlike pytest's own."""
    place = Path(tempfile.mkdtemp(prefix="engine-confined-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def confinement(number: int) -> list[str]:
    """What Docker does with `cap_drop: [ALL]`, `no-new-privileges` and `user`."""
    user = ["--reuid", str(number), "--regid", str(number), "--clear-groups"]
    return ["setpriv", *user, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def container_user() -> int:
    """The images' user; or root, without its capabilities the same to ptrace, where only root reaches our Python."""
    start_another = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import engine'], check=True)"
    words = [*confinement(10001), sys.executable, "-c", start_another]
    return 10001 if subprocess.run(words, check=False, capture_output=True).returncode == 0 else 0


def pair(engine: RunningEngine) -> tuple[psutil.Process, psutil.Process]:
    """The double's core and API server."""
    api = (p for p in engine.family() if "engine_double.py -m" in (line := command_line(p)) and "guard" not in line)
    return engine.one("engine_double.py core"), next(api)


def limits(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can start it as another user"
)
def test_without_any_capability_a_hang_leaves_the_stacks_of_all(folder: Path) -> None:
    number = container_user()
    engine = with_double(folder / "run", HOME=str(folder))
    engine.before = confinement(number)
    (folder / "run" / "state").mkdir()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, number, number)
    with engine:
        engine.wait_for("ready")
        core, api = pair(engine)
        for process in (core, api):
            held = limits(process.pid)
            assert (held["CapEff"], held["CapBnd"], held["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
            assert held["Uid"].split() == [str(number)] * 4
        core.send_signal(signal.SIGSTOP)
        wait_until("the hang to be mended", lambda: engine.status()["restarts"] == 1)
        engine.wait_for("ready")
        [place] = engine.evidence()
        for process, function in ((core, "core ("), (api, "<module>")):
            text = (place / f"stacks-{process.pid}.txt").read_text()
            assert "engine_double.py" in text
            assert function in text


async def test_where_the_kernel_refuses_the_processes_write_their_stacks_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under Yama's `ptrace_scope` 2, or a profile of seccomp: py-spy says no. The core is stopped, the API server not."""
    refusing = folder / "py-spy"
    refusing.write_text("#!/bin/sh\necho 'Error: Permission denied (os error 13)' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(evidence.shutil, "which", lambda name, path=None: str(refusing) if name == "py-spy" else None)
    with with_double(folder / "run", ENGINE_HANG_SECONDS="60") as engine:
        engine.wait_for("ready")
        core, api = pair(engine)
        core.send_signal(signal.SIGSTOP)
        wait_until("the core to be stopped", lambda: family.table()[core.pid].state == "T")
        with subprocess.Popen(["sleep", "60"]) as stranger:
            table = family.table()
            members = [table[process] for process in (core.pid, api.pid, stranger.pid)]
            place = await evidence.take(folder / "evidence", "hung", {}, [], members, {})
            assert stranger.poll() is None  # it was not sent a signal that it would have died of
            stranger.kill()
        for process, function in ((core, "in core"), (api, "in <module>")):
            text = (place / f"stacks-{process.pid}.txt").read_text()
            assert text.startswith("Error: Permission denied")
            assert "written by the process itself" in text
            assert "engine_double.py" in text
            assert function in text
        assert "none of Python" in (place / f"stacks-{stranger.pid}.txt").read_text()
        assert [process.is_running() for process in (core, api)] == [True, True]
