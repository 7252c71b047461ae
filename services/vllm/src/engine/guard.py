"""The process between the supervisor and vLLM: `python -m engine.guard -- vLLM's command line`.

It leads a session of its own, adopts every orphan in it, and ends only when the whole family is gone:
- the supervisor's end of the life line (standard input) closes, even by `kill -9`: the family is killed;
- vLLM's API server ends, however: what it left behind is killed, its shared memory removed, its exit code passed on;
- SIGTERM and SIGINT go to the API server alone, which drains and stops its own children.
Should this process itself be killed, the kernel kills the API server, and the supervisor sweeps the session.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from typing import Any

from engine import family

_SET_PDEATHSIG = 1
_LOOK_SECONDS = 5.0  # how often the shared memory in use is noted, for whoever dies without a word


def _die_with_guard() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main(argv: list[str]) -> int:
    """Run `argv` to its end; its exit code, or 128 + the signal that ended it."""
    family.adopt_orphans()
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = subprocess.Popen(  # one thread, and only a system call before exec
        argv, stdin=subprocess.DEVNULL, preexec_fn=_die_with_guard
    )

    def pass_on(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, number)  # not Popen's: it would reap the child behind our back

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    held: set[str] = set()
    code: int | None = None
    while code is None:
        readable, _, _ = select.select([0, wake_read], [], [], _LOOK_SECONDS)
        if wake_read in readable:
            os.read(wake_read, 4096)
        held |= family.shared_memory([process.pid for process in family.members(os.getsid(0), os.getpid())])
        if 0 in readable and not os.read(0, 4096):
            break  # the supervisor is gone, and with it everyone who would use this engine
        code = _reap(child.pid)
    # Everyone is dead or a zombie now, unless the kernel holds one in a driver call: that one is not waited for.
    if family.kill(os.getsid(0), os.getpid()):
        ended = _reap(child.pid, options=0)
        code = ended if code is None else code
    family.unlink_abandoned(held)
    return 0 if code is None else code


def _reap(pid: int, options: int = os.WNOHANG) -> int | None:
    """Collect whoever ended, adopted orphans too; the exit code of `pid` if it was among them."""
    code = None
    while True:
        try:
            ended, status = os.waitpid(-1, options)
        except ChildProcessError:
            return code
        if ended == 0:
            return code
        if ended == pid:
            value = os.waitstatus_to_exitcode(status)
            code = value if value >= 0 else 128 - value


if __name__ == "__main__":
    sys.exit(main(sys.argv[sys.argv.index("--") + 1 :]))
