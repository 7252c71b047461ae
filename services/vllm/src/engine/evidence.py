"""What is written down before a hung engine is killed, so that the next day somebody can find the cause.

One folder a hang: `report.json`, `log.txt`, `processes.json`, `stacks-<pid>.txt` of every process, `nvidia-smi.txt`
where there are GPUs. Stacks come from py-spy, which reads a process's memory without its help, so a stopped or spinning
one is no obstacle. Where the kernel refuses that, the process is asked by a signal to write them itself (`stacks.py`);
a stopped one is continued for it, since it is killed in a moment anyway. No locals are taken: they would hold prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine import stacks
from engine.family import Process

KEPT = 10  # folders; the oldest go
_TOOL_SECONDS = 5.0  # a wedged driver must not delay the restart
_SIGNAL_SECONDS = 2.0


async def take(
    folder: Path,
    what: str,
    facts: Mapping[str, Any],
    lines: Sequence[str],
    members: Sequence[Process],
    env: Mapping[str, str],
) -> Path:
    """Write one folder of evidence under `folder`; its path. Tools run side by side, each with a deadline."""
    place = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{what}"
    place.mkdir(parents=True)
    communication = {
        name: value for name, value in sorted(env.items()) if name.startswith(("NCCL_", "TORCH_NCCL_", "GLOO_", "OMP_"))
    }
    report = {"what": what, "communication": communication, **facts}
    (place / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    (place / "log.txt").write_text("\n".join(lines) + "\n")
    (place / "processes.json").write_text(json.dumps([_describe(process) for process in members], indent=2) + "\n")
    py_spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    jobs = [_stacks(process, py_spy, place / f"stacks-{process.pid}.txt") for process in members]
    if nvidia_smi := shutil.which("nvidia-smi"):
        jobs.append(_run([nvidia_smi, "-q"], place / "nvidia-smi.txt"))
    await asyncio.gather(*jobs)
    for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


async def _stacks(process: Process, py_spy: str | None, output: Path) -> None:
    """The Python stacks of one process, or why there are none."""
    if py_spy is None:
        output.write_text("py-spy is not installed\n")
    else:
        # Not blocking: pausing a process that is stopped already would wait for ever.
        await _run([py_spy, "dump", "--nonblocking", "--pid", str(process.pid)], output)
    if b"Thread " in output.read_bytes():
        return
    found = _memory_file(process.pid)
    if found is None:
        with output.open("a") as sink:
            sink.write("and it does not listen to the signal that asks for its stacks: none of Python\n")
        return
    before = found.stat().st_size
    with contextlib.suppress(OSError):
        os.kill(process.pid, stacks.SIGNAL)
        if process.state in "Tt":
            os.kill(process.pid, signal.SIGCONT)  # the signal is handled before anything else goes on
        size, deadline = -1, time.monotonic() + _SIGNAL_SECONDS
        while (now := found.stat().st_size) != size or now == before:
            if time.monotonic() > deadline:
                break
            size = now
            await asyncio.sleep(0.05)
        with output.open("ab") as sink:
            sink.write(b"\nwritten by the process itself, on a signal:\n" + found.read_bytes()[before:])


def _memory_file(pid: int) -> Path | None:
    """The file that the process writes its stacks to on a signal; None when it would die of that signal instead."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:") and not int(line.split()[1], 16) >> (stacks.SIGNAL - 1) & 1:
                return None
    mark = f"/memfd:{stacks.memory_file(pid)} "
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if os.readlink(entry.path).startswith(mark):
                    return Path(entry.path)
    return None


def _describe(process: Process) -> dict[str, Any]:
    facts: dict[str, Any] = {"pid": process.pid, "parent": process.parent, "state": process.state, "name": process.name}
    for name in ("wchan", "cmdline"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process.pid}/{name}").read_text(errors="replace")
            facts[name] = text.replace("\0", " ").strip()[:300]
    return facts


async def _run(argv: Sequence[str], output: Path) -> None:
    with output.open("wb") as sink:
        try:
            process = await asyncio.create_subprocess_exec(*argv, stdout=sink, stderr=asyncio.subprocess.STDOUT)
        except OSError as error:
            sink.write(f"{argv[0]}: {error}\n".encode())
            return
        try:
            await asyncio.wait_for(process.wait(), _TOOL_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            sink.write(f"{argv[0]}: no answer within {_TOOL_SECONDS:g} s\n".encode())
            # Not waited for: a tool inside a wedged driver does not die.
