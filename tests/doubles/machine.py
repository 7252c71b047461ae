"""How long something may take on this machine, as busy as it is."""

from __future__ import annotations

import os


def patience(seconds: float) -> float:
    """`seconds` where a process that can run does run; as much longer as it waits for its processor, on average.

    For promises in seconds: on a quiet machine they are judged as they are.
    """
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
