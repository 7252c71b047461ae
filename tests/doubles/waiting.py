"""Waiting for what will be: asked again and again until a deadline that only a real fault reaches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0  # seconds; costs nothing when things work, and is far above what anything takes on a busy machine


def wait_until(what: str, probe: Callable[[], Any], seconds: float = PATIENCE, every: float = 0.02) -> Any:
    """The first true value of `probe`; fails naming `what` after `seconds`. The last look is after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        late = time.monotonic() > deadline
        found = probe()
        if found:
            return found
        if late:
            raise AssertionError(f"{what}: not within {seconds:g} s (last value: {found!r})")
        time.sleep(every)


async def until(what: str, probe: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """`wait_until` for a test that runs on the loop itself."""
    deadline = time.monotonic() + seconds
    while not probe():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.01)
