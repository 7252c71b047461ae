"""Log lines as JSON on stdout: ours, and vLLM's, taken apart so that one format leaves this container."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from loguru import logger

_SECRET = re.compile(r"(?i)(bearer\s+|(?:api[-_]key|token)['\"]?[=:]['\" ]*|\bsk-|\bhf_)[A-Za-z0-9._~+/=-]{6,}")
# "(EngineCore pid=813) INFO 11-23 06:54:09 [shm_broadcast.py:871] No available …"
_VLLM = re.compile(
    r"^(?:\((?P<process>[\w-]+) pid=(?P<pid>\d+)\) )?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) "
    r"\d\d-\d\d \d\d:\d\d:\d\d (?:\[(?P<source>[^\]]+)\] )?(?P<text>.*)$"
)
_LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"}


def masked(text: str) -> str:
    """`text` with everything that looks like a secret masked."""
    return _SECRET.sub(lambda found: found[1] + "********", text)


def configure(level: str) -> None:
    """Send loguru to stdout as JSON lines."""

    def sink(message: Any) -> None:
        record = message.record
        line = {
            "time": record["time"].isoformat(),
            "level": record["level"].name.lower(),
            "event": record["message"],
            **record["extra"],
        }
        sys.stdout.write(json.dumps(line, default=str, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    logger.remove()
    logger.add(sink, level=level, backtrace=False, diagnose=False, catch=True)


def relay(line: str) -> str:
    """Log one line that vLLM printed; its text alone."""
    found = _VLLM.match(line)
    if found is None:
        text = masked(line)
        logger.bind(text=text).info("vllm_output")
        return text
    text = masked(found["text"])
    fields = {name: found[name] for name in ("process", "source") if found[name]}
    level = found["level"] if found["level"] in _LEVELS else "INFO"
    logger.bind(text=text, **fields).log(level, "vllm_log")
    return text
