"""Lets the supervisor see the Python stacks of vLLM's processes where the kernel does not let one process read another.

A copy of this file is put on vLLM's PYTHONPATH as `sitecustomize`: every Python process of vLLM runs it first. It
- allows the supervisor's py-spy to read the process also where Yama lets only parents do that (`ptrace_scope` 1, which
  is common on hosts of containers);
- writes the stacks of all threads to a memory file whenever the signal SIGNAL comes, for where ptrace is refused
  altogether. That needs neither the interpreter's lock nor the process's help, only that it is not stopped.
Standard library only; whatever fails here must not keep vLLM from starting.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.machinery
import importlib.util
import os
import signal
import sys

SIGNAL = signal.SIGRTMIN + 6
_SET_PTRACER, _ANYBODY = 0x59616D61, -1  # of the same user, as the kernel demands anyway


def memory_file(pid: int) -> str:
    """The name of the file of process `pid`; a forked one has its parent's open too."""
    return f"engine-stacks-{pid}"


def listen() -> None:
    """Do both for this process."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PTRACER, ctypes.c_ulong(_ANYBODY), 0, 0, 0)
        faulthandler.register(SIGNAL, os.memfd_create(memory_file(os.getpid())), all_threads=True)


def _pass_on() -> None:
    """Run the `sitecustomize` that this one hides, if the machine has one."""
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [folder for folder in sys.path if os.path.abspath(folder) != here]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if found is not None and found.loader is not None:
        found.loader.exec_module(importlib.util.module_from_spec(found))


if __name__ == "sitecustomize":
    listen()
    os.register_at_fork(after_in_child=listen)  # a forked process has a file of its own
    _pass_on()
