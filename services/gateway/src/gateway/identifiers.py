"""Fresh identifiers for calls, traces and spans.

`os.urandom` lets other threads run while it waits for the kernel; on a busy event loop getting back costs some 40 µs,
three times a call. Random bytes are therefore fetched for a few hundred identifiers at once.
"""

from __future__ import annotations

import os
import time

_POOL_BYTES = 8192
_pool = ""
_at = 0


def fresh(digits: int = 32) -> str:
    """`digits` random hexadecimal digits, never all zero (W3C trace context forbids it). For the event loop only."""
    global _pool, _at
    end = _at + digits
    if end > len(_pool):
        _pool = os.urandom(_POOL_BYTES).hex()
        _at, end = 0, digits
    taken = _pool[_at:end]
    _at = end
    return taken if taken.strip("0") else fresh(digits)


def ordered() -> str:
    """An identifier that sorts by the time it was made at: Unix milliseconds in 13 decimal digits, 19 random ones.

    Request ids are a unique column of the ledger. Random ones touch a page of its index each, and the commit writes
    every page; ordered ones touch the last page, however large the ledger is (docs/profile.md). nginx makes its ids in
    the same form.
    """
    return f"{time.time() * 1e3:013.0f}{fresh(19)}"
