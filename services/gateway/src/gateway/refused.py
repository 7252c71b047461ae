"""An engine's refusal of a call as ours: its words where they help the caller, without addresses of memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from gateway.call import Outcome
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    NoBackend,
    RequestTooLarge,
    UnknownRoute,
    UpstreamError,
)

if TYPE_CHECKING:
    from gateway.call import Call

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


def error_of(call: Call, status: int, body: bytes) -> GatewayError:
    """Our error for an engine's error status. 4xx texts help the caller and are passed on without addresses."""
    if status in (400, 404, 405, 413, 415, 422, 501):
        call.outcome = Outcome.REJECTED
        message, param = _message_in(body)
        if status in (404, 405) and not message:
            return UnknownRoute(f"This model does not offer {call.endpoint.path}.")
        if status == 404:
            return ModelNotFound(message or "The engine does not know this model.", param=param)
        if status == 413:
            return RequestTooLarge(message or "The engine finds the request too large.", param=param)
        return InvalidRequest(message or "The engine does not accept this request.", param=param)
    if status in (429, 503):
        return NoBackend("The engine takes no more calls at the moment.")
    return UpstreamError("The engine failed to answer this call.")


def _message_in(body: bytes) -> tuple[str, str | None]:
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None
    error = said.get("error", said) if isinstance(said, dict) else None
    if not isinstance(error, dict):
        return "", None
    message, param = error.get("message"), error.get("param")
    text = _ADDRESS.sub("0x…", message[:2000]) if isinstance(message, str) else ""
    return text, param if isinstance(param, str) else None
