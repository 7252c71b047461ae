"""Usage records for tests."""

from __future__ import annotations

import time
from typing import Any

from gateway.call import UsageRecord


def record(request_id: str, **fields: Any) -> UsageRecord:
    """A record of an answered call, started now."""
    values: dict[str, Any] = {
        "request_id": request_id, "key_id": "key_1", "organisation": None, "model": "m", "endpoint": "chat_completions",
        "prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": 0, "outcome": "ok", "code": None, "status": 200,
        "stream": False, "started_at": time.time(), "duration_seconds": 1.0, "queue_seconds": 0.0,
        "first_token_seconds": None, "trace_id": None, "backend": None, "day": "2026-01-01",
    }  # fmt: skip
    return UsageRecord(**{**values, **fields})
