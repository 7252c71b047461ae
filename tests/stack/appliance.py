"""The CPU appliance under test: compose.yaml and compose.cpu.yaml as they are, settings by environment only."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.stack.edge import Edge
from tests.stack.waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
STANDIN = REPOSITORY / "scripts" / "docker-standin"
FILES = ("compose.yaml", "compose.cpu.yaml")
PREFIX = "proof-"  # of every project that tests start
NOTES: list[str] = []  # what a reader of the result must know; printed at the end of the run
LEDGER_QUERY = """
import json, sqlite3
book = sqlite3.connect("file:/data/gateway.sqlite3?mode=ro", uri=True, timeout=30)
book.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in book.execute("SELECT * FROM usage_records")], default=str))
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, below those that the kernel gives to outgoing connections: they are used minutes later."""
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


class DockerMissing(Exception):
    """This machine cannot run Docker; the message says why."""


@dataclass
class Appliance:
    """One Compose project of its own, reached from outside through its published ports."""

    project: str = field(default_factory=lambda: f"{PREFIX}{secrets.token_hex(3)}")
    settings: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    key: str = ""
    files: tuple[str, ...] = FILES
    disk: str = ""

    def __post_init__(self) -> None:
        https, http, prometheus, alertmanager = free_ports(4)
        self.settings = {
            "COMPOSE_PROJECT_NAME": self.project,
            "APPLIANCE_PREFIX": "appliance-proof",  # images are shared by all runs: a second build costs nothing
            "EDGE_ADDRESS": "127.0.0.1",
            "EDGE_SUBNET": f"172.30.{secrets.randbelow(200)}.0/28",
            "HTTPS_PORT": str(https),
            "HTTP_PORT": str(http),
            "PROMETHEUS_PORT": str(prometheus),
            "ALERTMANAGER_PORT": str(alertmanager),
            "ENGINE_MEMORY": "6g",  # what the small model needs, twice; a test makes it run out
            "OTEL_EXPORTER_OTLP_ENDPOINT": "",  # no image stands in for Jaeger
            **self.settings,
        }

    # Docker

    def run(self, *command: str, check: bool = True, seconds: float = 900, **more: object) -> str:
        """A command with the Docker of this machine, or the stand-in's, on its PATH; its output."""
        done = subprocess.run(  # type: ignore[call-overload]
            [STANDIN, "exec", *command],
            cwd=REPOSITORY,
            env={**os.environ, **self.settings},
            capture_output=True,
            text=True,
            timeout=seconds,
            **more,
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return str(done.stdout)

    def docker(self, *words: str, **more: object) -> str:
        """`docker …`"""
        return self.run("docker", *words, **more)  # type: ignore[arg-type]

    def compose(self, *words: str, **more: object) -> str:
        """`docker compose -f … …` as the README has it."""
        files = [word for name in self.files for word in ("-f", name)]
        return self.run("docker", "compose", *files, *words, **more)  # type: ignore[arg-type]

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        label = f"label=com.docker.compose.project={self.project}"
        named = f"label=com.docker.compose.service={service}"
        return self.docker("ps", "-aq", "--no-trunc", "--filter", label, "--filter", named).split()[0]

    def inspect(self, service: str) -> dict[str, object]:
        """What Docker knows of a service's container."""
        return dict(json.loads(self.docker("inspect", self.container(service)))[0])

    def exec(self, service: str, *command: str, check: bool = True, **more: object) -> str:
        """A command inside a service's container."""
        return self.docker("exec", self.container(service), *command, check=check, **more)

    # Life

    def services(self) -> list[str]:
        """The services whose images can be had here."""
        described = json.loads(self.compose("config", "--format", "json"))["services"]
        return sorted(name for name, one in described.items() if one["image"] not in self.left_out)

    def build(self) -> float:
        """Builds the images; seconds it took."""
        started = time.monotonic()
        self.compose("build", *self.services(), seconds=2400)
        return time.monotonic() - started

    def up(self, *services: str) -> float:
        """Starts the services and returns once a call would be admitted; seconds it took."""
        started = time.monotonic()
        self.compose("up", "--detach", "--no-build", *(services or self.services()), seconds=1200)
        until("a call would be admitted", self.edge.ready, 900, every=0.5)
        return time.monotonic() - started

    def down(self) -> None:
        """Removes everything but the images."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", seconds=300)
        if self.disk:
            subprocess.run(["losetup", "--detach", self.disk], check=True)
            self.disk = ""

    def give_ledger_a_disk(self, image: Path, size: int = 64 << 20) -> None:
        """Puts the ledger's volume on a small file system of its own (`image` is its file), so that it can be full.

        Where the machine has no loop devices, the volume stays an ordinary one, and `disk` empty.
        """
        with image.open("wb") as file:
            file.truncate(size)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-m", "0", str(image)], check=True)
            words = ["losetup", "--find", "--show", str(image)]
            self.disk = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return
        labels = (f"com.docker.compose.project={self.project}", "com.docker.compose.volume=gateway-data")
        words = [word for label in labels for word in ("--label", label)]
        words += [word for option in ("type=ext4", f"device={self.disk}") for word in ("--opt", option)]
        self.docker("volume", "create", *words, f"{self.project}_gateway-data")

    # From outside

    @property
    def edge(self) -> Edge:
        """The published HTTPS port, its certificate trusted once it is there."""
        return Edge("127.0.0.1", int(self.settings["HTTPS_PORT"]), self.key)

    def create_key(self, name: str, *limits: str) -> dict[str, object]:
        """A key made as the README says; the JSON the program prints."""
        words = ("-m", "gateway", "keys", "create", "--name", name, "--json", *limits)
        return dict(json.loads(self.compose("exec", "-T", "gateway", "python3", *words)))

    def ledger(self) -> list[dict[str, object]]:
        """Every usage record, read beside the running gateway."""
        return list(json.loads(self.exec("gateway", "python3", "-c", LEDGER_QUERY)))

    def logs(self, *services: str) -> str:
        """What the services have written, also in containers that ended."""
        return self.compose("logs", "--no-color", "--no-log-prefix", *services)


def remove_leftovers() -> None:
    """Takes away what a run that was killed has left in our own Docker: it would hold subnets, ports and memory."""
    ours = "label=com.docker.compose.project"
    name = '{{.Label "com.docker.compose.project"}}'

    def docker(*words: str) -> list[str]:
        return subprocess.run(
            [STANDIN, "exec", "docker", *words], check=True, capture_output=True, text=True, timeout=300
        ).stdout.split()

    projects = {one for kind in ("ps --all", "network ls", "volume ls")
                for one in docker(*kind.split(), "--filter", ours, "--format", name)}  # fmt: skip
    for project in sorted(one for one in projects if one.startswith(PREFIX)):
        label = f"{ours}={project}"
        alarms = docker("ps", "--all", "--quiet", "--filter", f"name={project}")
        for kind, list_words, remove_words in (
            ("container", ["ps", "--all"], ["rm", "--force", "--volumes"]),
            ("network", ["network", "ls"], ["network", "rm"]),
            ("volume", ["volume", "ls"], ["volume", "rm", "--force"]),
        ):
            found = docker(*list_words, "--quiet", "--filter", label)
            found += [one for one in alarms if kind == "container" and one not in found]
            if found:
                docker(*remove_words, *found)


def start_docker() -> bool:
    """Makes Docker answer. True if it was us who started it. Raises `DockerMissing`."""
    running = subprocess.run([STANDIN, "exec", "docker", "version"], capture_output=True).returncode == 0
    with tempfile.TemporaryFile("w+") as told:  # a pipe would be held open by the daemon
        done = subprocess.run([STANDIN, "start"], stdout=told, stderr=told, timeout=900)
        told.seek(0)
        words = told.read().strip()
    if done.returncode == 3:
        raise DockerMissing(words.splitlines()[-1])
    assert done.returncode == 0, words
    return not running


def stand_ins() -> list[str]:
    """Makes what base images nobody gives us; the images that nothing can stand in for."""
    done = subprocess.run([STANDIN, "images"], capture_output=True, text=True, timeout=1800)
    if done.returncode == 3:
        raise DockerMissing(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
