"""JSON lines on standard output: a constant event name, the rest as fields."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message


def configure(level: str) -> None:
    """Send events of `level` and above to standard output."""
    logger.remove()
    logger.add(_write, level=level, format="{message}")


def _write(message: Message) -> None:
    record = message.record
    entry = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name.lower(),
        "service": "gpu-exporter",
        "event": record["message"],
        **record["extra"],
    }
    if record["exception"]:
        entry["exception"] = repr(record["exception"].value)
    print(json.dumps(entry, default=str), file=sys.stdout, flush=True)
