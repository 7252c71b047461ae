"""Local mode's settings: ports, model, folders; read once, every problem at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.init import settings as edge_settings

from .places import ROOT, Places, places

# What we need ourselves of what may be given as a file; the gateway reads its own.
READ_HERE = ("VLLM_API_KEY", "GATEWAY_ADMIN_KEY", "HF_TOKEN")
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Ports:
    """Every port of the local path, each with a variable, so that two appliances can run side by side."""

    https: int
    http: int
    edge_status: int
    gateway: int
    vllm: int
    engine_status: int
    gpu_exporter: int
    prometheus: int

    def by_variable(self) -> dict[str, int]:
        """Variable name to port."""
        return dict(zip(PORT_VARIABLES, (getattr(self, name) for name in self.__slots__), strict=True))


PORT_VARIABLES = (
    "HTTPS_PORT", "HTTP_PORT", "EDGE_STATUS_PORT", "GATEWAY_PORT", "VLLM_PORT", "ENGINE_STATUS_PORT",
    "GPU_EXPORTER_PORT", "PROMETHEUS_PORT",
)  # fmt: skip
PORT_DEFAULTS = (8443, 8088, 8081, 8080, 8000, 8001, 9101, 9090)


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """What local mode runs with."""

    places: Places
    ports: Ports
    edge: edge_settings.EdgeSettings
    model: str
    own_certificate: Path
    edge_address: str
    start_seconds: float
    environment: dict[str, str]

    @property
    def embedded(self) -> bool:
        """Whether the model is the one that comes with the appliance."""
        return self.model == EMBEDDED_MODEL


def read(environment: Mapping[str, str]) -> LocalSettings:
    """Raises `edge_settings.SettingsError` with every problem."""
    problems: list[str] = []
    try:
        edge = edge_settings.read(environment, https_port=8443, http_port=8088)
    except edge_settings.SettingsError as bad:
        problems += bad.problems
        edge = edge_settings.read({}, 8443, 8088)
    numbers: list[int] = []
    for variable, default in zip(PORT_VARIABLES, PORT_DEFAULTS, strict=True):
        text = environment.get(variable, "").strip() or str(default)
        if text.isdecimal() and 1 <= int(text) <= 65535:
            numbers.append(int(text))
        else:
            if variable not in {"HTTPS_PORT", "HTTP_PORT"}:  # the edge's settings have said it
                problems.append(f"{variable}: {text!r} is not a port from 1 to 65535")
            numbers.append(default)
    ports = Ports(*numbers)
    seen: dict[int, str] = {}
    for variable, port in ports.by_variable().items():
        if port in seen and {variable, seen[port]} != {"HTTPS_PORT", "HTTP_PORT"}:
            problems.append(f"{seen[port]} and {variable} are both {port}; they must differ")
        seen.setdefault(port, variable)
    if edge.acme_email is not None:
        problems.append("LETSENCRYPT_EMAIL: local mode cannot ask Let's Encrypt (nginx's ACME module is in the image)")
    seconds = environment.get("UP_SECONDS", "").strip() or "1800"
    if not seconds.isdecimal() or int(seconds) < 1:
        problems.append(f"UP_SECONDS: {seconds!r} is not a number of seconds")
        seconds = "1800"
    given = dict(environment)
    for name in READ_HERE:
        if path := given.pop(f"{name}_FILE", "").strip():
            try:
                given[name] = Path(path).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as bad:
                problems.append(
                    f"{name}_FILE: cannot read {path}: {getattr(bad, 'strerror', None) or 'it is not text'}"
                )
    if problems:
        raise edge_settings.SettingsError(problems)
    certificates = environment.get("CERTIFICATES_DIR", "").strip()
    return LocalSettings(
        places=places(environment),
        ports=ports,
        edge=edge,
        model=environment.get("MODEL_NAME", "").strip() or EMBEDDED_MODEL,
        own_certificate=(ROOT / os.path.expanduser(certificates or "certificates")).absolute(),
        edge_address=environment.get("EDGE_ADDRESS", "").strip() or "0.0.0.0",
        start_seconds=float(seconds),
        environment=given,
    )
