"""What a client of the connection protocol may take, and what it is told by the server itself when it takes more."""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec

from gateway.exchange import date_line, status_line

MOST_CONNECTIONS = 16_384


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take: seconds, bytes and connections."""

    head_seconds: float = 15.0
    idle_seconds: float = 75.0
    body_stall_seconds: float = 30.0
    body_seconds: float = 300.0
    write_stall_seconds: float = 120.0
    linger_seconds: float = 5.0
    body_bytes: int = 22_020_096
    connections: int = MOST_CONNECTIONS
    sweep_seconds: float = 1.0


def refusal(status: int, message: str) -> bytes:
    """A whole response of the server itself, in the API's error shape; the connection ends with it."""
    if status == 413:
        code, kind = "request_too_large", "invalid_request_error"
    elif status < 500 or status in (501, 505):
        code, kind = "invalid_request", "invalid_request_error"
    elif status == 503:
        code, kind = "shutting_down", "server_error"
    else:
        code, kind = "internal_error", "server_error"
    body = msgspec.json.encode({"error": {"message": message, "type": kind, "code": code, "param": None}})
    return b"".join(
        (
            status_line(status),
            date_line(),
            b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body),
            b"x-request-id: %b\r\n" % os.urandom(16).hex().encode("ascii"),
            b"retry-after: 1\r\n" if status == 503 else b"",
            b"connection: close\r\n\r\n",
            body,
        )
    )
