"""Waiting for an event with a deadline; every wait says what it waits for."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(what: str, happened: Callable[[], T], seconds: float, every: float = 0.05) -> T:
    """The first true answer of `happened`; fails naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if answer := happened():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
