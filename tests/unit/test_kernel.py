"""Helper threads stand back, and memory lies in large pages where the kernel can do that."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import kernel
from gateway.lines import LineWriter

SOURCES = Path(kernel.__file__).parents[1]
GROWN = """
import re
from pathlib import Path
from gateway import kernel
many = [number.to_bytes(100, "big") for number in range(400_000)]
large = kernel.use_large_pages()
assert all(one == number.to_bytes(100, "big") for number, one in enumerate(many))
print(large, re.search(r"AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""


def can_collapse() -> bool:
    """Whether this kernel gives a large page when it is asked for one."""
    with mmap.mmap(-1, 2 * kernel.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as some:
        some.write(b"x" * len(some))
        start = ctypes.addressof(ctypes.c_char.from_buffer(some))
        try:
            some.madvise(kernel._COLLAPSE, -start % kernel.PAGE, kernel.PAGE)
        except OSError:
            return False
        return True


def test_what_is_in_use_comes_into_large_pages_and_stays_what_it_was() -> None:
    if not can_collapse():
        pytest.skip("this kernel has no large page to give (MADV_COLLAPSE needs Linux 6.1)")
    done = subprocess.run(
        [sys.executable, "-c", GROWN], env={**os.environ, "PYTHONPATH": str(SOURCES)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    large, kilobytes = map(int, done.stdout.split())
    assert large > 0  # of the 27 that so many objects fill; a kernel whose memory is scattered gives fewer
    assert kilobytes >= large * kernel.PAGE // 1024


def test_a_kernel_that_refuses_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_COLLAPSE", 12345)
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    assert kernel.use_large_pages() == 0
    kernel.stand_back()


def refused(*_: object) -> None:
    raise PermissionError


def test_the_thread_of_the_log_stands_back() -> None:
    reading, writing = os.pipe()
    writer = LineWriter(writing)
    try:
        writer.write({"event": "one"})
        assert os.read(reading, 100) == b'{"event":"one"}\n'
        assert os.sched_getscheduler(writer._thread.native_id or 0) == os.SCHED_BATCH
    finally:
        writer.close()
        os.close(reading)
        os.close(writing)
