"""What this machine has: Docker, GPUs, ports, room. Reads only; every answer is a value, no decision is taken here."""

from __future__ import annotations

import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from .places import ROOT, program


@dataclass(frozen=True, slots=True)
class Docker:
    """Docker as this user finds it. `reason` says why it cannot be used, None when it can."""

    installed: bool
    reason: str | None = None
    denied: bool = False  # the daemon is there and refuses this user
    compose: tuple[int, int] | None = None
    nvidia: bool = False
    root: str | None = None


def _told(*argv: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(argv, 124, "", f"no answer within {seconds:.0f} s")


def docker() -> Docker:
    """Ask the client, the daemon and the Compose plugin."""
    if program("docker") is None:
        return Docker(installed=False, reason="docker is not installed")
    info = _told("docker", "info", "--format", "{{.ServerVersion}}|{{.DockerRootDir}}|{{json .Runtimes}}")
    if info.returncode != 0 or not info.stdout.strip().split("|")[0]:
        text = (info.stderr or info.stdout).strip()
        denied = "permission denied" in text.lower()
        return Docker(True, "no permission" if denied else f"its daemon does not answer ({_last_line(text)})", denied)
    _, root, runtimes = info.stdout.strip().split("|", 2)
    version = _told("docker", "compose", "version", "--short")
    if version.returncode != 0:
        return Docker(True, "its Compose plugin (docker compose, version 2.24 or newer) is missing")
    major, minor = (int("".join(c for c in part if c.isdigit()) or 0) for part in version.stdout.strip().split(".")[:2])
    if (major, minor) < (2, 24):
        return Docker(True, f"its Compose plugin is {major}.{minor}; 2.24 or newer is needed")
    return Docker(True, None, False, (major, minor), "nvidia" in runtimes or _cdi_nvidia(), root)


def _cdi_nvidia() -> bool:
    """GPUs handed out through CDI instead of a runtime of their own."""
    return any(Path(folder).glob("nvidia*") for folder in ("/etc/cdi", "/var/run/cdi") if Path(folder).is_dir())


def gpus() -> int:
    """How many GPUs the NVIDIA driver shows; 0 without a driver."""
    if program("nvidia-smi") is None:
        return 0
    listed = _told("nvidia-smi", "-L")
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def port_taken(port: int, address: str = "0.0.0.0") -> str | None:
    """None when `port` can be listened on, else by whom or why not."""
    with socket.socket() as probe:
        # As servers do: a port whose last connection is only just closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError:
            return "only root may listen there"
        except OSError as problem:
            return _listener(port) or problem.strerror or "it cannot be used"
    return None


def _listener(port: int) -> str | None:
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return "another program uses it"
    for connection in connections:
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            if connection.pid is None:
                return "another program uses it"
            try:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid}) uses it"
            except psutil.Error:
                return "another program uses it"
    return None


def free_mib(folder: Path) -> int:
    """Free MiB for us where `folder` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free // (1024 * 1024)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "no reason given"
