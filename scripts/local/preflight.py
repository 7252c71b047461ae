"""Everything that can be known to be wrong before anything is started or changed. Reads only."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from services.init import certificate

from . import machine, variables
from .machine import Docker
from .places import ROOT, program
from .settings import LocalSettings

STATE_MIB = 512  # logs, ledger, certificates; the engine's own needs are checked by who installs it
IMAGES_MIB = {"gpu": 40_000, "cpu": 12_000}


def local(settings: LocalSettings) -> list[str]:
    """What stands in the way of local mode, one line each; empty when nothing does."""
    problems = [
        f"port {port} ({variable}) cannot be used: {taken}; stop that program or set {variable} to another port"
        for variable, port in settings.ports.by_variable().items()
        if (variable != "PROMETHEUS_PORT" or program("prometheus"))
        and (taken := machine.port_taken(port, _address(variable, settings)))
    ]
    problems += own_certificate(settings.own_certificate)
    problems += _state(settings)
    problems += _gateway(settings)
    problems += _model(settings)
    return problems


def compose(mode: str, environment: Mapping[str, str], docker: Docker, own: Path, running: bool) -> list[str]:
    """The same for the forms with Docker; `running`: our own containers hold the ports already."""
    problems = variables.not_for_containers(environment) + own_certificate(own)
    if not running:
        published = {"HTTPS_PORT": 443, "HTTP_PORT": 80, "GRAFANA_PORT": 3000, "PROMETHEUS_PORT": 9090}
        published |= {"ALERTMANAGER_PORT": 9093, "JAEGER_PORT": 16686, "LOKI_PORT": 3100}
        for variable, default in published.items():
            text = environment.get(variable, "").strip() or str(default)
            if not text.isdecimal() or not 1 <= int(text) <= 65535:
                problems.append(f"{variable}: {text!r} is not a port from 1 to 65535")
            # The daemon, not we, will listen: a low port is no problem for it.
            elif (taken := machine.port_taken(int(text))) and taken != "only root may listen there":
                problems.append(
                    f"port {text} ({variable}) cannot be used: {taken}; stop that program or set {variable}"
                )
    images = Path(docker.root) if docker.root else None
    if images is not None and not running and os.access(images.parent, os.X_OK):
        free = machine.free_mib(images)
        needed = IMAGES_MIB[mode]
        if free < needed and not _built(mode):
            problems.append(f"{needed} MiB are needed for images and model, {images} has {free} MiB free")
    return problems


def own_certificate(folder: Path) -> list[str]:
    """The user's certificate, if there is one: readable, a pair, valid."""
    try:
        if not any((folder / name).exists() for name in (certificate.CHAIN, certificate.KEY)):
            return []
        certificate.check_own(folder, dt.datetime.now(dt.UTC))
    except certificate.CertificateError as bad:
        return [str(bad)]
    except OSError as bad:
        return [f"{folder} cannot be read: {bad.strerror}"]
    return []


def _address(variable: str, settings: LocalSettings) -> str:
    return settings.edge_address if variable in {"HTTPS_PORT", "HTTP_PORT"} else "127.0.0.1"


def _state(settings: LocalSettings) -> list[str]:
    state = settings.places.state
    present = state
    while not present.exists():
        present = present.parent
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        return [f"the state folder {state} cannot be written (APPLIANCE_STATE names another one)"]
    free = machine.free_mib(state)
    needed = STATE_MIB
    return [] if free >= needed else [f"{needed} MiB are needed in {state}, {free} MiB are free"]


def _gateway(settings: LocalSettings) -> list[str]:
    """The gateway judges its own variables."""
    from .plan import gateway_environment

    checked = subprocess.run(
        [str(ROOT / ".venv/bin/gateway"), "check"],
        env=gateway_environment(settings, secrets=False),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if checked.returncode == 0:
        return []
    lines = [line.strip() for line in checked.stderr.splitlines() if line.strip()]
    return lines or [f"`gateway check` ended with {checked.returncode}"]


def _model(settings: LocalSettings) -> list[str]:
    """A model that is meant as a folder must be one; names on a hub are looked up when it is fetched."""
    if settings.embedded or not settings.model.startswith((".", "/", "~")):
        return []
    folder = Path(settings.model).expanduser()
    if (folder / "config.json").is_file():
        return []
    return [f"MODEL_NAME={settings.model}: there is no model in that folder (no config.json)"]


def _built(mode: str) -> bool:
    name = "engine" if mode == "gpu" else "engine-cpu"
    found = subprocess.run(
        ["docker", "image", "inspect", f"appliance/{name}:dev"], capture_output=True, check=False, cwd=ROOT
    )
    return found.returncode == 0
