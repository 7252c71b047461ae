"""Where local mode keeps what: everything under one state folder, with the names of Compose's volumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Places:
    """Paths of one appliance on this machine."""

    state: Path

    @property
    def certificates(self) -> Path:
        """What nginx serves."""
        return self.state / "edge-certificates"

    @property
    def edge_config(self) -> Path:
        return self.state / "edge-config"

    @property
    def gateway_data(self) -> Path:
        return self.state / "gateway-data"

    @property
    def gateway_secrets(self) -> Path:
        return self.state / "gateway-secrets"

    @property
    def engine_secrets(self) -> Path:
        return self.state / "engine-secrets"

    @property
    def engine_cache(self) -> Path:
        return self.state / "engine-cache"

    @property
    def prometheus_data(self) -> Path:
        return self.state / "prometheus-data"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def run(self) -> Path:
        """What is true only while processes run."""
        return self.state / "run"

    @property
    def deployed(self) -> Path:
        """What `make up` started last, for the other verbs."""
        return self.state / "deployed.json"

    @property
    def mounted(self) -> Path:
        """With which of this checkout's files the containers run."""
        return self.state / "mounted.json"

    @property
    def trusted(self) -> Path:
        """The served certificate, without its key, for `curl --cacert`."""
        return self.state / "certificate.pem"


def places(environment: Mapping[str, str]) -> Places:
    """The state folder named by `APPLIANCE_STATE`, else `.state` in the repository."""
    given = environment.get("APPLIANCE_STATE", "").strip()
    return Places(Path(given).expanduser().absolute() if given else ROOT / ".state")


def program(name: str) -> Path | None:
    """A program on PATH or in the folders where packages put servers."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/usr/local/sbin", "/sbin"]
    for folder in folders:
        path = Path(folder, name)
        if folder and path.is_file() and os.access(path, os.X_OK):
            return path
    return None
