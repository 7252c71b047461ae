"""How much memory this machine has: its GPUs', by NVIDIA's own program, and its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

MIB = 1 << 20


def gpus() -> list[int]:
    """The memory of each GPU, bytes; empty where there is none or the driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return []
    return [int(line) * MIB for line in done.stdout.split() if line.isdecimal()]


def available() -> int:
    """Memory that programs can still take, bytes: the machine's, or what the container's limit leaves."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            break
    else:
        return 0
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        if (text := limit.read_text().strip()).isdecimal():
            free = min(free, int(text) - int(used.read_text()))
    except OSError:
        pass  # no version 2 control groups: no limit that we could see
    return free
