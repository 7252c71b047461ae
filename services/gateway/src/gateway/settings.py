"""The gateway's configuration: one field a variable, read once, frozen; the only place with defaults.

`docs/configuration.md` and `.env.example` are generated from these fields. Every problem is reported at once with the
variable's name and the fix; unknown `GATEWAY_*` names, and `VLLM_*` names that look like one of ours,
are errors with the nearest match; secrets also come by
`NAME_FILE`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ConfigurationError(Exception):
    """The environment cannot be used; `problems` has one line each, naming the variable and the fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class BackendConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine of `BACKENDS`. `models` are the names callers use; `served_name` what the engine calls its model."""

    name: str
    url: str
    api_key: str | None = None
    models: list[str] | None = None
    weight: int = 1
    served_name: str | None = None


class Settings(BaseSettings):
    """Everything that can be set, with units in the descriptions. 0 for a limit means none."""

    model_config = SettingsConfigDict(
        allow_inf_nan=False, frozen=True, extra="ignore", case_sensitive=False, populate_by_name=True
    )

    # Listening
    gateway_host: str = Field("127.0.0.1", description="Address to listen on.")
    gateway_port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    gateway_server: Literal["fast", "stock"] = Field(
        "fast", description="Connection protocol: `fast` (httptools) or `stock` (Hypercorn's own)."
    )
    gateway_workers: int = Field(
        1, description="Only 1: admission has one owner. More machines: see docs/architecture.md."
    )
    trusted_proxies: str = Field(
        "127.0.0.0/8,::1/128", description="Networks (CIDR, comma-separated) whose X-Forwarded-For counts."
    )
    max_body_bytes: int = Field(20_971_520, ge=1024, description="Largest request body, bytes; 413 above.")
    bodies_in_flight_bytes: int = Field(
        268_435_456, ge=1024, description="All request bodies held at once, bytes; 429 above."
    )

    # Engines
    vllm_url: str = Field("http://127.0.0.1:8000", description="The engine, when BACKENDS is not set.")
    vllm_api_key: SecretStr | None = Field(None, description="Key the engine expects.")
    backends: str | None = Field(
        None,
        description='JSON list of {"name","url","api_key"?,"models"?,"weight"?,"served_name"?}; replaces VLLM_URL.',
    )
    engine_concurrency: int = Field(64, ge=1, description="Calls in one engine at once.")
    queue_calls: int = Field(256, ge=0, description="Calls that may wait for the engine.")
    queue_tokens: int = Field(2_000_000, ge=0, description="Tokens (prompt and held output) that may wait.")
    queue_seconds: float = Field(30.0, gt=0, description="Longest wait for the engine, seconds.")
    connect_seconds: float = Field(5.0, gt=0, description="Time to connect to the engine, seconds.")
    first_byte_seconds: float = Field(300.0, gt=0, description="Silence before a stream's first token, seconds.")
    answer_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "Wait for an answer that is not streamed, which comes when all of it is made, seconds. "
            "Unset: FIRST_BYTE_SECONDS where that is set, else 1800. The edge gives up after 3600."
        ),
    )
    idle_seconds: float = Field(120.0, gt=0, description="Silence between two bytes of an answer, seconds.")
    keep_alive_seconds: float = Field(
        10.0,
        ge=0,
        description="`: keep-alive` comments while a stream is silent, every so many seconds; 0 = none.",
    )
    health_seconds: float = Field(2.0, gt=0, description="Time between two health checks of an engine, seconds.")
    breaker_failures: int = Field(5, ge=1, description="Failures in a row that open an engine's breaker.")
    breaker_seconds: float = Field(5.0, gt=0, description="Time an open breaker waits before a probe, seconds.")
    retry_ratio: float = Field(
        0.1, ge=0, le=1, description="Retry budget: retries before the first byte, as a share of calls."
    )
    drain_seconds: float = Field(30.0, ge=0, description="Time running calls get after SIGTERM, seconds.")

    # What a request may ask for
    max_n: int = Field(8, ge=1, description="Largest `n` and `best_of`.")
    max_logprobs: int = Field(20, ge=0, description="Largest `logprobs` / `top_logprobs`.")
    max_output_tokens: int = Field(0, ge=0, description="Largest output of one call, tokens; 0 = the model's length.")
    max_prompts: int = Field(256, ge=1, description="Prompts or documents in one call.")
    max_inputs: int = Field(2_048, ge=1, description="Inputs to embed in one call.")
    max_media: int = Field(16, ge=0, description="Images, audios or videos in one call.")
    media_tokens: int = Field(4096, ge=0, description="Tokens held for one media item until the engine has counted.")
    remote_media: bool = Field(False, description="Whether media may be named by http(s) URL.")

    # Keys and limits
    gateway_api_keys: SecretStr | None = Field(
        None, description="Keys that exist from the start, comma-separated (`name=secret` or `secret`)."
    )
    gateway_admin_key: SecretStr | None = Field(None, description="Key of /admin; without it /admin is closed.")
    admin_networks: str = Field(
        "127.0.0.0/8,::1/128,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7",
        description="Networks (CIDR, comma-separated) from which /admin may be used, with its key.",
    )
    database_url: str = Field(
        "sqlite:///gateway.sqlite3", description="Keys and ledger: sqlite:///file or postgresql://…"
    )
    spool_dir: str | None = Field(
        None,
        description=(
            "Where usage is kept while the database refuses, and with PostgreSQL the calls under way; "
            "default: beside the SQLite file, with PostgreSQL the working folder."
        ),
    )
    quota_timezone: str = Field("UTC", description="Time zone whose midnight turns the daily quota.")
    usage_retention_days: int = Field(
        90, ge=0, description="Days single usage records are kept (daily totals stay); 0 = for ever."
    )
    hold_seconds: float = Field(900.0, gt=0, description="Lease of a hold, renewed while its call runs, seconds.")
    default_daily_tokens: int = Field(0, ge=0, description="Daily tokens of a key that has no limit of its own.")
    default_requests_per_minute: int = Field(0, ge=0, description="Requests a minute of such a key.")
    default_tokens_per_minute: int = Field(0, ge=0, description="Tokens a minute of such a key.")
    default_concurrency: int = Field(0, ge=0, description="Calls at once of such a key.")
    default_output_tokens: int = Field(
        4096,
        ge=16,
        description="Output held for a call that sets no limit itself, where a token limit holds; also its limit.",
    )
    ip_requests_per_minute: int = Field(0, ge=0, description="Requests a minute of one client address.")

    # Telling
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least severe log line.")
    otel_exporter_otlp_endpoint: str | None = Field(
        None,
        description="OTLP/HTTP base URL of the trace collector, e.g. http://jaeger:4318; none = no traces.",
    )
    trace_ratio: float = Field(0.1, ge=0, le=1, description="Share of calls traced; errors and slow ones always are.")
    trace_slow_seconds: float = Field(10.0, gt=0, description="A call slower than this is always traced, seconds.")
    gpu_exporter_url: str | None = Field(None, description="The GPU exporter, for joules per key; none = not counted.")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes in: the environment is read in one place."""
        return (init_settings,)

    @property
    def whole_answer_seconds(self) -> float:
        """How long an answer in one piece may take: as said, or as long as was said for the first byte."""
        if self.answer_seconds is not None:
            return self.answer_seconds
        return self.first_byte_seconds if "first_byte_seconds" in self.model_fields_set else 1800.0

    @field_validator("vllm_url", "otel_exporter_otlp_endpoint", "gpu_exporter_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a URL like http://host:port")
        return value.rstrip("/")

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str) -> str:
        if not value.startswith(("sqlite:///", "postgresql://")):
            raise ValueError("must start with sqlite:/// or postgresql://")
        return value

    @field_validator("gateway_workers")
    @classmethod
    def _one_worker(cls, value: int) -> int:
        if value != 1:
            raise ValueError("must be 1: quotas, queue and breakers have one owner (docs/architecture.md)")
        return value

    @field_validator("quota_timezone")
    @classmethod
    def _zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError):
            raise ValueError("must be a time zone like UTC or Europe/Berlin") from None
        return value

    @field_validator("trusted_proxies", "admin_networks")
    @classmethod
    def _networks(cls, value: str) -> str:
        _parse_networks(value)
        return value

    @field_validator("backends")
    @classmethod
    def _backends(cls, value: str | None) -> str | None:
        if value is not None:
            _parse_backends(value)
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("gateway_api_keys", "gateway_admin_key")
    @classmethod
    def _real_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or not value.get_secret_value():
            return None
        if any(secret.lower() in PLACEHOLDERS for _, secret in split_keys(value.get_secret_value())):
            raise ValueError("has a placeholder instead of a secret")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.keep_alive_seconds and self.keep_alive_seconds >= self.idle_seconds:
            raise ValueError("KEEP_ALIVE_SECONDS must be below IDLE_SECONDS")
        return self

    @property
    def proxy_networks(self) -> tuple[Network, ...]:
        """`TRUSTED_PROXIES`, parsed."""
        return _parse_networks(self.trusted_proxies)

    @property
    def admin_network_list(self) -> tuple[Network, ...]:
        """`ADMIN_NETWORKS`, parsed."""
        return _parse_networks(self.admin_networks)

    @property
    def backend_configs(self) -> list[BackendConfig]:
        """`BACKENDS`, or the one engine of `VLLM_URL`."""
        if self.backends is not None:
            return _parse_backends(self.backends)
        key = self.vllm_api_key.get_secret_value() if self.vllm_api_key else None
        return [BackendConfig(name="vllm", url=self.vllm_url, api_key=key or None)]

    def hidden(self) -> dict[str, Any]:
        """The effective configuration, variable by variable, with secrets hidden."""
        shown: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = HIDDEN
            elif name == "backends" and value is not None:
                value = [
                    {**msgspec.to_builtins(b), "url": _without_secrets(b.url), "api_key": HIDDEN if b.api_key else None}
                    for b in self.backend_configs
                ]
            elif isinstance(value, str) and "://" in value:
                value = _without_secrets(value)
            shown[name.upper()] = value
        return shown


HIDDEN = "********"
_SECRET_PARAMETER = re.compile(r"(?i)([?&](?:[^=&]*(?:password|passfile|secret|token|key)[^=&]*)=)[^&#]*")


def _without_secrets(url: str) -> str:
    """`url` without what stands before its host, and without the values of parameters that sound like secrets."""
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    if "@" in place:
        place = f"{HIDDEN}@{place.rpartition('@')[2]}"
    return _SECRET_PARAMETER.sub(rf"\1{HIDDEN}", f"{scheme}://{place}{slash}{path}")


PLACEHOLDERS = frozenset(("changeme", "change-me", "change_me", "secret", "supersecret", "password", "your-key-here"))
FOREIGN = frozenset({"GATEWAY_MEMORY"})  # Compose's own, read from the same environment
SECRETS = ("vllm_api_key", "gateway_api_keys", "gateway_admin_key", "database_url", "backends")


def split_keys(value: str) -> list[tuple[str | None, str]]:
    """`GATEWAY_API_KEYS` as (name or None, secret): `name=secret` or `secret`, comma-separated.

    A secret may itself end in `=` (base64), so an equals sign with nothing but more of them behind it names nothing.
    """
    found: list[tuple[str | None, str]] = []
    for part in value.split(","):
        name, _, secret = part.strip().partition("=")
        if not name or not secret.strip("="):
            name, secret = "", part.strip()
        if secret.strip():
            found.append((name.strip() or None, secret.strip()))
    return found


def _parse_networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(part.strip()) for part in value.split(",") if part.strip())


def _parse_backends(value: str) -> list[BackendConfig]:
    try:
        configs = msgspec.json.decode(value, type=list[BackendConfig])
    except msgspec.DecodeError as error:
        raise ValueError(f"must be a JSON list of backends: {error}") from None
    if not configs:
        raise ValueError("must name at least one backend")
    names = [config.name for config in configs]
    if len(set(names)) != len(names):
        raise ValueError("must give every backend a name of its own")
    for config in configs:
        if urlsplit(config.url).scheme not in ("http", "https"):
            raise ValueError(f"has a URL that is not http(s), in backend {config.name!r}")
        if config.weight < 1:
            raise ValueError(f"must have a weight of at least 1, in backend {config.name!r}")
    return configs


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the environment. Raises `ConfigurationError` with every problem found.

    An empty value counts as not set. `NAME_FILE` holds the path of a file with the secret `NAME`.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    fields = Settings.model_fields
    values: dict[str, str] = {}
    known = {name.upper() for name in fields} | {f"{name.upper()}_FILE" for name in SECRETS}
    for name in fields:
        if value := environ.get(name.upper(), "").strip():
            values[name] = value
    for name in SECRETS:
        variable = f"{name.upper()}_FILE"
        if path := environ.get(variable, "").strip():
            if name in values:
                problems.append(f"{variable}: {name.upper()} is set too; keep one of them")
                continue
            try:
                if secret := Path(path).read_text(encoding="utf-8").strip():
                    values[name] = secret
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "is not UTF-8 text"
                problems.append(f"{variable}: cannot read {path}: {reason}")
    ours = {name for name in known if name.startswith("VLLM_")}
    for variable in sorted(environ):
        # Most of these names are the engine's and vLLM's own, so only what looks like one of ours is judged.
        near = difflib.get_close_matches(variable, ours, n=1, cutoff=0.8) if variable.startswith("VLLM_") else []
        if near and variable not in known:
            problems.append(f"{variable}: no such setting; did you mean {near[0]}?")
        if variable.startswith("GATEWAY_") and variable not in known | FOREIGN:
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{variable}: no such setting{hint}")
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_input=False, include_url=False):
            where = str(item["loc"][0]).upper() if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {message}" if where else message)
        raise ConfigurationError(problems) from None
    if problems:
        raise ConfigurationError(problems)
    return settings
