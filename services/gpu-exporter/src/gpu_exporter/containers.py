"""Which container a process belongs to, read from its control group. Needs the host's process namespace."""

from __future__ import annotations

import re
from pathlib import Path

CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


def container_of(pid: int, proc: Path = Path("/proc")) -> str:
    """The first twelve digits of the container's id, `host` outside containers, `unknown` when it cannot be read."""
    try:
        group = (proc / str(pid) / "cgroup").read_text()
    except OSError:
        return "unknown"
    found = CONTAINER_ID.search(group)
    return found.group()[:12] if found else "host"
