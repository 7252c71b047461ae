"""What the kernel is asked for, so that one core does more; a kernel that refuses costs nothing but speed.

Measured in docs/decisions/0208-what-the-kernel-is-asked-for.md and 0209-room-for-all-open-files.md.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
from contextlib import suppress
from pathlib import Path

PAGE = 2 << 20  # bytes of a large page on x86-64 and on arm64 with small pages of 4 kB
_COLLAPSE = 25  # MADV_COLLAPSE, madvise(2), since Linux 6.1
_MEMORY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?\n")  # private and of no file


def stand_back() -> None:
    """The calling thread no longer interrupts the one that runs on its core when it is woken (SCHED_BATCH, sched(7)).

    For helper threads: woken by the event loop they would take its core only to wait for Python's lock.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def make_room_for_files(count: int) -> None:
    """Let the table of open files have `count` places now; it never shrinks.

    It doubles when it is full, and in a process with threads whoever opens the next file then waits until every
    processor has passed a quiet point (RCU): 6 to 19 ms, in which the event loop would serve nobody.
    """
    with suppress(OSError), open(os.devnull, "rb") as file:
        os.close(fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, count - 1))


def use_large_pages() -> int:
    """Put the memory that is in use now into large pages, where the kernel can; how many it is in now.

    The objects of some hundred calls lie scattered over a heap of which small pages fill the processor's page cache.
    Takes 3 to 4 ms a page, so it belongs to the start; memory that is not in use is left alone.
    """
    try:
        advise = ctypes.CDLL(None).madvise
        found = _MEMORY.findall(Path("/proc/self/maps").read_text())
    except (AttributeError, OSError):
        return 0
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    large = 0
    for low, high in ((int(low, 16), int(high, 16)) for low, high in found):
        for place in range(-(-low // PAGE) * PAGE, high // PAGE * PAGE, PAGE):
            large += advise(place, PAGE, _COLLAPSE) == 0
    return large
