"""Stage 1: who is calling.

`Authorization: Bearer …` or `X-API-Key: …`; the SHA-256 of what was sent is looked up in memory and compared in
constant time. Nothing of what was sent is ever repeated in an answer.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from time import time
from typing import Protocol

from gateway.call import Call, Caller
from gateway.errors import InvalidApiKey, LedgerUnavailable, MissingApiKey, ModelNotAllowed
from gateway.keyring import Clock, Keyring

_NOBODY = bytes(32)


class Headers(Protocol):
    """Request headers: lower-case names, values as they came."""

    def get(self, name: bytes, /) -> bytes | None:
        """The value of `name`, or None."""
        ...


class Auth:
    """Turns a secret into `call.caller`."""

    def __init__(self, keyring: Keyring, clock: Clock = time) -> None:
        self._keyring = keyring
        self._clock = clock

    def identify(self, call: Call, headers: Headers) -> None:
        """Set `call.caller`. Raises 401 for an unknown key, 403 for a disabled or expired one, 503 without keys."""
        call.caller = self._known(headers)  # set first: the refusal is recorded for its key
        self._check(call.caller)

    def caller(self, headers: Headers) -> Caller:
        """The caller of a request that is no call (models, usage); raises as `identify`."""
        caller = self._known(headers)
        self._check(caller)
        return caller

    def _check(self, caller: Caller) -> None:
        if caller.disabled or caller.expires_at is not None:
            problem = self._keyring.problem(caller)
            if problem is not None:
                raise problem

    def _known(self, headers: Headers) -> Caller:
        secret = presented(headers)
        if secret is None:
            raise MissingApiKey("Send your key as 'Authorization: Bearer …' or 'X-API-Key: …'.")
        digest = sha256(secret).digest()
        entry = self._keyring.find(digest)
        # The same comparison runs for a known and for an unknown digest.
        matches = hmac.compare_digest(digest, _NOBODY if entry is None else entry.digest)
        if entry is None or not matches:
            if not self._keyring.loaded:
                raise LedgerUnavailable("Keys cannot be read at the moment.")
            raise InvalidApiKey("This key is not valid.")
        now = self._clock()
        if now < entry.not_before or (entry.not_after is not None and now >= entry.not_after):
            raise InvalidApiKey("This key is not valid.")
        return entry.caller

    def allow(self, call: Call) -> None:
        """Raise `ModelNotAllowed` unless the caller may use the model that the request names."""
        assert call.caller is not None
        assert call.request is not None
        models = call.caller.models
        if models is not None and call.request.model not in models:
            raise ModelNotAllowed("This key may not use this model.", param="model")


def presented(headers: Headers) -> bytes | None:
    """The secret that was sent, or None. Two different ones are refused: it must be clear who pays."""
    authorization = headers.get(b"authorization")
    other = headers.get(b"x-api-key")
    bearer = None
    if authorization is not None:
        scheme, _, rest = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            bearer = rest.strip() or None
    if other is not None:
        other = other.strip() or None
    if bearer is not None and other is not None and not hmac.compare_digest(bearer, other):
        raise InvalidApiKey("Two different keys were sent; send one.")
    return bearer if bearer is not None else other
