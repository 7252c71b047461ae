"""What is written down before a hung engine is killed, so that the next day somebody can find the cause.

One folder a hang: `report.json`, `log.txt`, `processes.json`, `stacks-<pid>.txt` of every process (by py-spy, which
reads a process's memory without its help, so a stopped or spinning one is no obstacle), `nvidia-smi.txt` where there
are GPUs. No locals are taken: they would hold prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.family import Process

KEPT = 10  # folders; the oldest go
_TOOL_SECONDS = 5.0  # a wedged driver must not delay the restart


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
    jobs = []
    for process in members:
        if py_spy is not None:
            # Not blocking: pausing a process that is stopped already would wait for ever.
            argv = [py_spy, "dump", "--nonblocking", "--pid", str(process.pid)]
            jobs.append(_run(argv, place / f"stacks-{process.pid}.txt"))
    if nvidia_smi := shutil.which("nvidia-smi"):
        jobs.append(_run([nvidia_smi, "-q"], place / "nvidia-smi.txt"))
    await asyncio.gather(*jobs)
    for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return place


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
