"""Which of the three forms suits this machine. Pure: what the machine has in, choice and reason out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .machine import Docker

Mode = Literal["gpu", "cpu", "local"]


class ModeError(Exception):
    """No form can run as asked; the message says what to do, in one line."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The form and why."""

    mode: Mode
    why: str

    @property
    def files(self) -> list[str]:
        """The Compose files of this form; none in local mode."""
        return {"gpu": ["compose.yaml"], "cpu": ["compose.yaml", "compose.cpu.yaml"], "local": []}[self.mode]


def choose(wanted: str, docker: Docker, gpus: int, gpus_needed: int) -> Choice:
    """The form for this machine, or the one that `MODE` asks for. Raises `ModeError` when that cannot run."""
    wanted = wanted.strip().lower()
    if wanted not in {"", "gpu", "cpu", "local"}:
        raise ModeError(f"MODE={wanted!r} is not one of gpu, cpu, local")
    if wanted == "local":
        return Choice("local", "MODE=local")
    if docker.denied:
        raise ModeError(
            "Docker is here but refuses this user: `sudo usermod -aG docker $USER` and log in again, or use MODE=local"
        )
    if wanted in {"gpu", "cpu"} and docker.reason is not None:
        raise ModeError(f"MODE={wanted} needs Docker, but {docker.reason}")
    if wanted == "gpu" or (not wanted and docker.reason is None and gpus > 0):
        if gpus < gpus_needed:
            raise ModeError(
                f"TP_SIZE × PP_SIZE asks for {gpus_needed} GPUs, this machine shows {gpus}; "
                f"{f'set TP_SIZE={gpus} or ' if gpus else ''}choose MODE=cpu"
            )
        if not docker.nvidia:
            raise ModeError(
                "there are NVIDIA GPUs but Docker cannot hand them out: install the NVIDIA Container Toolkit "
                "(nvidia-ctk runtime configure --runtime=docker, restart Docker), or choose MODE=cpu"
            )
        return Choice("gpu", "MODE=gpu" if wanted else f"Docker and {gpus} NVIDIA GPU{'s' if gpus > 1 else ''}")
    if wanted == "cpu" or docker.reason is None:
        return Choice("cpu", "MODE=cpu" if wanted else "Docker, but no NVIDIA GPU")
    return Choice("local", f"no usable Docker: {docker.reason}")
