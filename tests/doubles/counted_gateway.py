"""`gateway serve` that counts its function calls: SIGUSR1 begins, SIGUSR2 ends and writes the number to argv[1].

Counts, not seconds: they hardly depend on the machine, its load, or its mood. What runs beside calls (health checks,
ledger ticks) adds a little; the counts are therefore taken over some hundred calls.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import signal
import sys
from pathlib import Path
from typing import Any

from gateway import app
from gateway.settings import load

_profile = cProfile.Profile()
_run = app._run


def _write() -> None:
    _profile.disable()
    found = pstats.Stats(_profile)
    rows = sorted(
        ((count, f"{Path(place[0]).name}:{place[1]} {place[2]}") for place, (_, count, *_) in found.stats.items()),  # type: ignore[attr-defined]
        reverse=True,
    )
    total = sum(count for count, _ in rows)
    part = Path(f"{sys.argv[1]}.part")
    part.write_text("\n".join([str(total), *(f"{count} {place}" for count, place in rows[:60])]))
    part.rename(sys.argv[1])
    _profile.clear()


async def _counted(*arguments: Any) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, _profile.enable)
    loop.add_signal_handler(signal.SIGUSR2, _write)
    await _run(*arguments)


if __name__ == "__main__":
    app._run = _counted
    sys.exit(app.serve(load()))
