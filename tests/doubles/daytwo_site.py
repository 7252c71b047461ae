"""A checkout of this product beside a `docker` with one project: where the day-two verbs run in tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = "appliance"
GIVEN = ("COMPOSE_", "APPLIANCE_", "VLLM_", "GATEWAY_", "GRAFANA_", "MODEL_", "CERTIFICATES_")


class Site:
    """The checkout in `checkout`; what Docker has in `docker`."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.docker = folder / "checkout", folder / "docker"
        shutil.copytree(REPOSITORY / "scripts", self.checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("compose.yaml", "compose.cpu.yaml"):
            shutil.copy(REPOSITORY / name, self.checkout)
        (self.docker / "volumes").mkdir(parents=True)
        programs = folder / "programs"
        programs.mkdir()
        (programs / "docker").symlink_to(REPOSITORY / "tests/doubles/docker_project.py")
        self.path = f"{programs}:{os.environ['PATH']}"

    @property
    def state(self) -> Path:
        return self.checkout / ".state"

    def volume(self, name: str) -> Path:
        """The folder of a volume, made where it is missing."""
        folder = self.docker / "volumes" / f"{PROJECT}_{name}"
        folder.mkdir(exist_ok=True)
        return folder

    def has(self, name: str, content: Any) -> None:
        """What Docker tells: `containers.json`, `images.json` and so on."""
        (self.docker / name).write_text(content if isinstance(content, str) else json.dumps(content))

    def told(self, name: str) -> Any:
        """What Docker would tell now."""
        return json.loads((self.docker / name).read_text())

    def calls(self) -> list[dict[str, Any]]:
        """Every call to Docker: its words, and the settings it was given."""
        path = self.docker / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verb(self, name: str, **settings: str) -> str:
        """What `make NAME` says, and its status."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(GIVEN)}
        environment = {**clean, "PATH": self.path, "DOCKER_PROJECT": str(self.docker), "MODE": "cpu", **settings}
        done = subprocess.run(
            [self.checkout / "scripts" / name],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )
        return f"{done.stdout}{done.stderr}status {done.returncode}"


def container(service: str, image: str = "", mounts: tuple[str, ...] = ()) -> dict[str, Any]:
    """A healthy container as `docker inspect` tells it; its image's id ends in the service's name."""
    named = {
        "com.docker.compose.service": service,
        "com.docker.compose.project.config_files": "/somewhere/compose.yaml",
    }
    return {
        "Id": f"id-of-{service}",
        "Image": f"sha256:{service}",
        "Config": {"Image": image or f"appliance/{service}:dev", "Labels": named},
        "State": {"Status": "running", "Running": True},
        "HostConfig": {"RestartPolicy": {"Name": "unless-stopped"}},
        "RestartCount": 0,
        "Mounts": [{"Source": source} for source in mounts],
    }
