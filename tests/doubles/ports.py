"""Ports for programs that must be told one: drawn from below those that the kernel gives out by itself.

A port that was found free by binding port 0 belongs to the range from which the kernel serves the next such bind and the
near end of every outgoing connection; until the program under test listens, anybody may get it. Nobody gets these.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 10_000


def _drawn() -> itertools.cycle[int]:
    """All ports of the range in turn, from a place that other runs on this machine do not begin at."""
    highest = min(int(RANGE.read_text().split()[0]), 32_768) if RANGE.exists() else 32_768
    ports = list(range(LOWEST, highest))
    begin = random.Random(os.urandom(8)).randrange(len(ports))
    return itertools.cycle(ports[begin:] + ports[:begin])


_ports = _drawn()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different, and none given twice by this process."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def accepts(port: int) -> bool:
    """Whether somebody listens on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
