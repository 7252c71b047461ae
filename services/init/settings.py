"""The edge's variables, read once; every problem is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .certificate import CertificateError, parse_hosts


class SettingsError(Exception):
    """Bad variables; `problems` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class EdgeSettings:
    """What the operator may set about the edge."""

    https_port: int
    http_port: int
    hosts: tuple[str, ...]
    requests_per_second: int
    connections: int
    max_body_bytes: int
    hsts: bool
    grafana: bool
    acme_email: str | None


def read(environment: Mapping[str, str], https_port: int = 443, http_port: int = 80) -> EdgeSettings:
    """The edge's settings from `environment`; the ports given are the defaults. Raises `SettingsError`."""
    problems: list[str] = []

    def number(name: str, default: int, low: int, high: int) -> int:
        text = environment.get(name, "").strip()
        if not text:
            return default
        if not text.isdecimal() or not low <= int(text) <= high:
            problems.append(f"{name}: {text!r} is not a whole number from {low} to {high}")
            return default
        return int(text)

    def switch(name: str) -> bool:
        text = environment.get(name, "").strip().lower()
        if text not in {"", "0", "1", "true", "false"}:
            problems.append(f"{name}: {text!r} is neither true nor false")
        return text in {"1", "true"}

    hosts: tuple[str, ...] = ()
    try:
        hosts = parse_hosts(environment.get("APPLIANCE_HOSTS", ""))
    except CertificateError as problem:
        problems.append(str(problem))
    email = environment.get("LETSENCRYPT_EMAIL", "").strip() or None
    if email is not None:
        if not (email.count("@") == 1 and all(c.isalnum() or c in "@.+-_" for c in email)):
            problems.append(f"LETSENCRYPT_EMAIL: {email!r} is not a mail address")
        if not hosts:
            problems.append("LETSENCRYPT_EMAIL is set but APPLIANCE_HOSTS names no host to get a certificate for")
        if wild := [host for host in hosts if host.startswith("*.")]:
            problems.append(f"APPLIANCE_HOSTS: {wild[0]}: no wildcards from Let's Encrypt this way; name the hosts")
    settings = EdgeSettings(
        https_port=number("HTTPS_PORT", https_port, 1, 65535),
        http_port=number("HTTP_PORT", http_port, 1, 65535),
        hosts=hosts,
        requests_per_second=number("EDGE_REQUESTS_PER_SECOND", 100, 0, 100_000),
        connections=number("EDGE_CONNECTIONS", 512, 0, 65_535),
        max_body_bytes=number("MAX_BODY_BYTES", 20_971_520, 1024, 1 << 31),
        hsts=switch("EDGE_HSTS"),
        grafana=switch("GRAFANA_AT_EDGE"),
        acme_email=email,
    )
    if settings.https_port == settings.http_port:
        problems.append(f"HTTPS_PORT and HTTP_PORT are both {settings.https_port}; they must differ")
    if problems:
        raise SettingsError(problems)
    return settings
