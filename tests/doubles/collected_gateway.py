"""`gateway serve` that says what it leaves for Python's cyclic collector: SIGUSR1 begins, SIGUSR2 writes to argv[1] the
number of its own objects that only the collector could free, and of which kinds they are.

Of third parties only asyncio's streams count, one pair of which Hypercorn makes for each connection.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gateway import app
from gateway.settings import load

_run = app._run


def _begin() -> None:
    gc.collect()
    gc.disable()


def _write() -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    kinds = Counter(
        type(found).__qualname__
        for found in gc.garbage
        if type(found).__module__.startswith(("gateway.", "asyncio.streams"))
    )
    gc.garbage.clear()
    gc.enable()
    part = Path(f"{sys.argv[1]}.part")
    part.write_text(f"{sum(kinds.values())}\n" + "\n".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    part.rename(sys.argv[1])


async def _collected(*arguments: Any) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, _begin)
    loop.add_signal_handler(signal.SIGUSR2, _write)
    await _run(*arguments)


if __name__ == "__main__":
    app._run = _collected
    sys.exit(app.serve(load()))
