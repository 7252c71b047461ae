"""Every error the gateway answers with: one tree, three families, rendered in one place.

Status, code and retry advice are class attributes, so the tree can be read as a table (and is: `docs/errors.md` is
generated from it). An instance adds the message for one call and, where it is known, the seconds to wait.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import msgspec


class GatewayError(Exception):
    """A call that ends with an error of ours.

    `retry_after` is in seconds: the true time after which the same call is expected to be admitted, None if unknown.
    `limit` names the limit that refused, for the message and the `x-ratelimit-*` headers.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    default_retry_after: ClassVar[float | None] = None
    should_retry: ClassVar[bool | None] = None  # official clients obey `x-should-retry`

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        limit: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.limit = limit
        self.retry_after = retry_after if retry_after is not None else self.default_retry_after
        self.extra_headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}

    def json(self) -> bytes:
        """The OpenAI error body as bytes."""
        return msgspec.json.encode(self.body())

    def headers(self) -> dict[str, str]:
        """Retry advice as headers; `retry-after` is whole seconds, at least 1, rounded up."""
        headers = dict(self.extra_headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


class CallerError(GatewayError):
    """The caller must change something."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class CapacityError(GatewayError):
    """Not now, or not any more today: a limit of the key or of the appliance."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    default_retry_after = 1.0


class BackendError(GatewayError):
    """The engine, or the way to it, failed."""

    status = 502
    code = "upstream_error"
    type = "server_error"


# The caller's


class InvalidRequest(CallerError):
    """The body or a parameter cannot be accepted."""


class MissingApiKey(CallerError):
    """No key was sent."""

    status, code, type = 401, "missing_api_key", "authentication_error"


class InvalidApiKey(CallerError):
    """The key is not known, or its secret is no longer valid."""

    status, code, type = 401, "invalid_api_key", "authentication_error"


class KeyDisabled(CallerError):
    """The key was disabled by an operator."""

    status, code, type = 403, "key_disabled", "permission_error"


class KeyExpired(CallerError):
    """The key's time is over."""

    status, code, type = 403, "key_expired", "permission_error"


class ModelNotAllowed(CallerError):
    """This key may not use this model."""

    status, code, type = 403, "model_not_allowed", "permission_error"


class ModelNotFound(CallerError):
    """No backend serves this model."""

    status, code = 404, "model_not_found"


class UnknownRoute(CallerError):
    """The path is not one of ours."""

    status, code = 404, "unknown_route"


class RequestTooLarge(CallerError):
    """The body is larger than MAX_BODY_BYTES."""

    status, code = 413, "request_too_large"


class ClientGone(CallerError):
    """The client closed the connection; nobody reads this answer."""

    status, code = 499, "client_gone"


# Capacity


class RateLimitExceeded(CapacityError):
    """Requests or tokens per minute of the key or the address."""


class ConcurrencyExceeded(CapacityError):
    """Too many calls of this key at once."""

    code = "concurrency_exceeded"


class QuotaExhausted(CapacityError):
    """The day's tokens are used up; waiting seconds cannot help."""

    code = "quota_exhausted"
    type = "insufficient_quota"
    should_retry = False


class QueueFull(CapacityError):
    """The waiting room is full."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """The call waited as long as it may."""

    status, code, type = 503, "queue_timeout", "server_error"


class ShuttingDown(CapacityError):
    """The gateway drains before it stops."""

    status, code, type = 503, "shutting_down", "server_error"
    default_retry_after = 5.0


class NoBackend(CapacityError):
    """No engine is healthy."""

    status, code, type = 503, "no_backend", "server_error"
    default_retry_after = 5.0


class LedgerUnavailable(CapacityError):
    """Usage cannot be recorded, so nothing is admitted."""

    status, code, type = 503, "ledger_unavailable", "server_error"
    default_retry_after = 2.0


# The backend's


class UpstreamError(BackendError):
    """The engine answered with a failure or broke off."""


class UpstreamTimeout(BackendError):
    """The engine kept silent for longer than it may."""

    status, code = 504, "upstream_timeout"


class InternalError(GatewayError):
    """A fault of ours; the request id leads to the log."""


def leaves() -> list[type[GatewayError]]:
    """All concrete errors, in the order of this file."""
    found: list[type[GatewayError]] = []

    def walk(cls: type[GatewayError]) -> None:
        children = cls.__subclasses__()
        if not children:
            found.append(cls)
        for child in children:
            walk(child)

    walk(GatewayError)
    return found
