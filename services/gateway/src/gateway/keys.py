"""Keys as an operator sees them: what can be set, how a secret is made, how a key is shown. No I/O.

A key's id is public and stable; its secrets are separate and only their SHA-256 is kept. null (None) for a limit means
the default of the environment, 0 means no limit.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from gateway.call import Caller, Limits, Priority
from gateway.errors import CallerError, InvalidRequest
from gateway.settings import Settings

SECRET_PREFIX = "sk-gw-"  # noqa: S105 - only the prefix
LIMIT_NAMES = ("requests_per_minute", "tokens_per_minute", "concurrency", "daily_tokens", "max_tokens")
_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_FIELD_PATH = re.compile(r"at `\$\.([A-Za-z_]+)")
_MOST = 2**53


class KeyNotFound(CallerError):
    """No key (or organisation) has this id."""

    status, code = 404, "key_not_found"


@dataclass(slots=True)
class Key:
    """A key as it is stored. `models` None = all. Times are Unix seconds. `origin`: environment or made."""

    id: str
    name: str
    organisation: str | None = None
    models: list[str] | None = None
    priority: str = "normal"
    weight: int = 1
    expires_at: float | None = None
    disabled: bool = False
    created_at: float = 0.0
    deleted_at: float | None = None
    limits: dict[str, int | None] = field(default_factory=dict)
    organisation_daily_tokens: int | None = None
    generation: int = 0
    origin: str = "made"

    def public(self) -> dict[str, Any]:
        """The key as JSON shows it; never a secret."""
        return {
            "id": self.id,
            "name": self.name,
            "organisation": self.organisation,
            **{name: self.limits.get(name) for name in LIMIT_NAMES},
            "models": self.models,
            "priority": self.priority,
            "weight": self.weight,
            "expires_at": self.expires_at,
            "disabled": self.disabled,
            "created_at": self.created_at,
            "origin": self.origin,
        }

    def caller(self, settings: Settings) -> Caller:
        """The key as the stages see it: missing limits filled from the environment's defaults."""
        defaults = {
            "requests_per_minute": settings.default_requests_per_minute,
            "tokens_per_minute": settings.default_tokens_per_minute,
            "concurrency": settings.default_concurrency,
            "daily_tokens": settings.default_daily_tokens,
            "max_tokens": 0,
        }
        chosen = {n: defaults[n] if (v := self.limits.get(n)) is None else v for n in LIMIT_NAMES}
        return Caller(
            key_id=self.id,
            name=self.name,
            limits=Limits(**chosen),
            organisation=self.organisation,
            organisation_daily_tokens=self.organisation_daily_tokens or 0,
            models=None if self.models is None else frozenset(self.models),
            priority=Priority(self.priority),
            weight=self.weight,
            disabled=self.disabled,
            expires_at=self.expires_at,
        )


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret of a key: its SHA-256 and when it is valid, Unix seconds (None: without end)."""

    digest: bytes
    key_id: str
    not_before: float
    not_after: float | None


def new_key_id() -> str:
    """A public, stable id."""
    return "key_" + secrets.token_hex(8)


def new_secret() -> str:
    """192 random bits with a prefix that scanners for leaked secrets can recognise."""
    return SECRET_PREFIX + secrets.token_urlsafe(24)


def digest_of(secret: str | bytes) -> bytes:
    """SHA-256 of a secret; header bytes and text of the same key give the same digest."""
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).digest()


Count = int | msgspec.UnsetType | None


class KeyFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What `POST` and `PATCH /admin/keys` and the command line may set; what is missing stays as it is."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    organisation: str | msgspec.UnsetType | None = msgspec.UNSET
    requests_per_minute: Count = msgspec.UNSET
    tokens_per_minute: Count = msgspec.UNSET
    concurrency: Count = msgspec.UNSET
    daily_tokens: Count = msgspec.UNSET
    max_tokens: Count = msgspec.UNSET
    models: list[str] | msgspec.UnsetType | None = msgspec.UNSET
    priority: str | msgspec.UnsetType | None = msgspec.UNSET
    weight: Count = msgspec.UNSET
    expires_at: float | str | msgspec.UnsetType | None = msgspec.UNSET

    def changes(self) -> dict[str, Any]:
        """The given fields, checked and in the form in which they are stored. Raises `InvalidRequest`."""
        given = {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) is not msgspec.UNSET}
        for name in ("name", "organisation"):
            if name in given and not (name == "organisation" and given[name] is None):
                given[name] = label(name, given[name])
        for name in LIMIT_NAMES:
            if given.get(name) is not None and not 0 <= given[name] <= _MOST:
                raise InvalidRequest(f"'{name}' must be 0 (no limit), a positive number or null.", param=name)
        if "models" in given and given["models"] is not None:
            given["models"] = _models(given["models"])
        if "priority" in given:
            given["priority"] = given["priority"] or "normal"
            if given["priority"] not in set(Priority):
                raise InvalidRequest("'priority' must be high, normal or low.", param="priority")
        if "weight" in given:
            given["weight"] = 1 if given["weight"] is None else given["weight"]
            if not 1 <= given["weight"] <= 1000:
                raise InvalidRequest("'weight' must be between 1 and 1000.", param="weight")
        if "expires_at" in given:
            given["expires_at"] = expiry(given["expires_at"])
        return given


def expiry(value: float | str | None) -> float | None:
    """Unix seconds from a number or an ISO 8601 time with a zone; 0 and None mean never."""
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidRequest("'expires_at' must be Unix seconds or an ISO 8601 time.", param="expires_at") from None
        if moment.tzinfo is None:
            raise InvalidRequest("'expires_at' must name a time zone, like 2030-01-01T00:00:00Z.", param="expires_at")
        value = moment.timestamp()
    if not value:
        return None
    if not 0 < value <= 253_402_300_799:  # the year 9999; also refuses NaN
        raise InvalidRequest("'expires_at' must be Unix seconds or an ISO 8601 time.", param="expires_at")
    return float(value)


class RotateFields(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a rotation: how long the old secrets stay valid, seconds."""

    grace_seconds: float = 0.0

    def seconds(self) -> float:
        """The grace time, checked. Raises `InvalidRequest`."""
        if not 0 <= self.grace_seconds <= 31_536_000:
            raise InvalidRequest("'grace_seconds' must be between 0 and a year.", param="grace_seconds")
        return self.grace_seconds


class OrganisationFields(msgspec.Struct, forbid_unknown_fields=True):
    """Body of a change of an organisation: its daily tokens over all keys, null or 0 for none."""

    daily_tokens: int | None

    def tokens(self) -> int | None:
        """The quota, checked. Raises `InvalidRequest`."""
        if self.daily_tokens is not None and not 0 <= self.daily_tokens <= _MOST:
            raise InvalidRequest("'daily_tokens' must be 0 (none), a positive number or null.", param="daily_tokens")
        return self.daily_tokens


T = TypeVar("T")


def decode(raw: bytes, kind: type[T]) -> T:
    """Read a JSON body of the admin API. Raises `InvalidRequest` naming what is wrong, unknown fields included."""
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body cannot be used: {_told(error)}.", param=_field_in(str(error))) from None


def decode_fields(raw: bytes, *, creating: bool = False) -> dict[str, Any]:
    """The fields of a key from a JSON body, as `KeyFields.changes`. Raises `InvalidRequest`."""
    changes = decode(raw, KeyFields).changes()
    if creating and "name" not in changes:
        raise InvalidRequest("'name' is required.", param="name")
    return changes


def _told(error: Exception) -> str:
    """msgspec's message names fields and kinds; a field's name is the caller's text, so it is cut."""
    return str(error)[:160]


def _field_in(told: str) -> str | None:
    """The field that msgspec's message is about, if it is about one."""
    found = _UNKNOWN_FIELD.search(told) or _FIELD_PATH.search(told)
    return found[1][:40] if found else None


def label(name: str, value: Any) -> str:
    """What people call a key or an organisation, without spaces around it. Raises `InvalidRequest` naming `name`."""
    if not isinstance(value, str) or not (text := value.strip()) or len(text) > 200 or not text.isprintable():
        raise InvalidRequest(f"'{name}' must be 1 to 200 printable characters.", param=name)
    return text


def _models(value: list[str]) -> list[str]:
    models = sorted({model.strip() for model in value})
    if not models or len(models) > 1000 or not all(0 < len(model) <= 200 and model.isprintable() for model in models):
        raise InvalidRequest("'models' must be a list of model names, or null for all.", param="models")
    return models
