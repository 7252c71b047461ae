"""The processes of one session, found in /proc: who they are, what shared memory they hold, how all of them end.

vLLM's processes stay in the session that the guard opens for them, also when their parents die; a child that leaves the
session is still found as a descendant. Linux only, as vLLM is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_SET_CHILD_SUBREAPER = 36
_SHARED_MEMORY = "/dev/shm/"  # noqa: S108  # only listed and unlinked, never opened


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    state: str  # R S D T Z …
    name: str


def table() -> dict[int, Process]:
    """All processes by id."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (process := _read(int(entry.name))) is not None:
            found[process.pid] = process
    return found


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parents die, instead of process 1."""
    ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_adopted() -> None:
    """Kill and collect the processes that were adopted: our children that Python did not start."""
    started = {"py-spy", "nvidia-smi"}  # tools of the evidence, which end by themselves
    adopted = [p for p in table().values() if p.parent == os.getpid() and p.name not in started]
    for process in adopted:
        kill(process.pid, process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def _read(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], name)


def members(session: int, root: int | None = None) -> list[Process]:
    """Processes of `session`, and descendants of `root` wherever they went; zombies too, `root` itself not."""
    processes = table()
    family = {process.pid for process in processes.values() if process.session == session}
    if root is not None:
        family.add(root)
    grown = True
    while grown:
        more = {p.pid for p in processes.values() if p.parent in family and p.pid not in family}
        grown = bool(more)
        family |= more
    family.discard(root if root is not None else -1)
    return [processes[pid] for pid in sorted(family) if pid in processes]


def shared_memory(pids: list[int]) -> set[str]:
    """Files under /dev/shm that these processes hold, mapped or open.

    Found by inode: a named semaphore is made under another name and linked, so its mapping shows a deleted file.
    """
    files = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(_SHARED_MEMORY):
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                files[found.st_dev, found.st_ino] = entry.path
    held: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
                fields = line.split(None, 5)  # range, rights, offset, device, inode, path
                if len(fields) == 6 and fields[5].startswith(_SHARED_MEMORY):
                    major, minor = (int(part, 16) for part in fields[3].split(":"))
                    held.add(files.get((os.makedev(major, minor), int(fields[4])), ""))
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).startswith(_SHARED_MEMORY):
                        opened = entry.stat()
                        held.add(files.get((opened.st_dev, opened.st_ino), ""))
    return held - {""}


def unlink_abandoned(files: set[str]) -> list[str]:
    """Remove those of `files` that no living process holds; what was removed."""
    present = {file for file in files if os.path.exists(file)}
    if not present:
        return []
    removed = []
    for file in sorted(present - shared_memory(list(table()))):
        with contextlib.suppress(OSError):
            os.unlink(file)
            removed.append(file)
    return removed


def kill(session: int, root: int | None = None, seconds: float = 10.0) -> bool:
    """SIGKILL everyone of the family until nobody but zombies is left; whether that succeeded in `seconds`.

    Repeats, because a process may fork between being listed and being killed. A stopped process dies of SIGKILL too.
    """
    deadline = time.monotonic() + seconds
    while True:
        living = [process for process in members(session, root) if process.state != "Z"]
        if not living:
            return True
        for process in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
