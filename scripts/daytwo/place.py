"""Where the appliance runs: Docker Compose, or processes of this machine. The day-two verbs see only this."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from scripts.daytwo.settings import REPOSITORY, setting, state

STATE = state()
CARRIER = Path(__file__).with_name("carrier.py")
# Keys, ledger, secrets, certificates, Grafana's users. Models can be fetched again; metrics, traces and logs age out.
KEPT = (
    "gateway-data", "gateway-secrets", "engine-secrets", "grafana-secrets", "edge-certificates", "edge-acme",
    "grafana-data",
)  # fmt: skip


MOST_RESTARTS = 5  # of a service that is waited for: then it will not come


class PlaceError(Exception):
    """The appliance cannot be found or handled; the message names the remedy."""


class Place(Protocol):
    """One running or stopped appliance."""

    mode: str

    def export(self, names: Iterable[str] = KEPT) -> "subprocess.Popen[bytes]":
        """A process whose standard output is the tar stream of those of the folders `names` that are there."""

    def replace(self, state: IO[bytes], names: Iterable[str]) -> None:
        """Puts the folders `names` of such a stream back. Nothing may be using them."""

    def running(self) -> list[str]:
        """Names of the services that run."""

    def restart(self, *services: str) -> None:
        """Restarts services one after the other, each healthy before the next."""

    def stop(self) -> None:
        """Stops every service; data stays."""

    def start(self) -> None:
        """Starts again what `stop` stopped and returns when it is healthy."""


def run(*command: str | Path, quiet: bool = True, **options: object) -> str:
    """A command's standard output. Raises `PlaceError` with its last words when it fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None, **options
    )
    if done.returncode:
        words = (done.stderr or b"").decode(errors="replace").strip().splitlines()[-3:]
        said = " ".join("…" if "\n" in str(word) else str(word) for word in command[:6])  # not a whole script
        raise PlaceError(f"`{said}` failed: {' / '.join(words) or done.returncode}")
    return str(done.stdout.decode())


@dataclass
class ComposePlace:
    """The appliance as a Compose project, handled by its labels: works whatever files it was started from."""

    project: str
    mode: str = "compose"
    image: str = ""  # one with Python; default: what the project's gateway runs, or ran
    folders: dict[str, str] = field(default_factory=dict)  # of this machine, where they stand for volumes

    def containers(self, all_of_them: bool = True) -> list[dict[str, object]]:
        """What `docker inspect` says of the project's containers."""
        # Whatever runs from an image of ours has the image's labels: only Compose's own containers have this one.
        ours = ("--filter", self._label(), "--filter", "label=com.docker.compose.oneoff=False")
        ids = run("docker", "ps", "-q", *(["-a"] if all_of_them else []), *ours).split()
        return list(json.loads(run("docker", "inspect", *ids))) if ids else []

    def volumes(self) -> dict[str, str]:
        """What Docker mounts by the names that compose.yaml gives the volumes."""
        listed = run("docker", "volume", "ls", "-q", "--filter", self._label()).split()
        described = json.loads(run("docker", "volume", "inspect", *listed)) if listed else []
        return {one["Labels"]["com.docker.compose.volume"]: one["Name"] for one in described} | self.folders

    def running(self) -> list[str]:
        return sorted(service_of(one) for one in self.containers(all_of_them=False))

    def export(self, names: Iterable[str] = KEPT) -> "subprocess.Popen[bytes]":
        present = self.volumes()
        there = [name for name in names if name in present]
        if not there:
            raise PlaceError(f"project {self.project} has no data; has `docker compose up` ever run?")
        return subprocess.Popen(self._carrier("export", there), stdout=subprocess.PIPE)

    def replace(self, state: IO[bytes], names: Iterable[str]) -> None:
        present = self.volumes()
        missing = [name for name in names if name not in present]
        if missing:
            raise PlaceError(
                f"project {self.project} has no volume {missing[0]}: run `docker compose up` once, then restore"
            )
        run(*self._carrier("import", list(names)), stdin=state)

    def restart(self, *services: str) -> None:
        for service in services:
            if service in self.running():
                run("docker", "compose", "-p", self.project, "restart", "--no-deps", service)
                self.await_healthy([service])

    def stop(self) -> None:
        run("docker", "compose", "-p", self.project, "stop")

    def start(self) -> None:
        # Only what runs for good: `init` and the like ended long ago and need not run again.
        lasting = sorted(service_of(one) for one in self.containers() if restarts(one))
        run("docker", "compose", "-p", self.project, "start", *lasting)
        self.await_healthy(lasting)

    def await_healthy(self, services: list[str], seconds: float = 1800) -> None:
        """Returns when every one of the services is healthy; raises `PlaceError` when one ends or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            found = {service_of(one): one for one in self.containers() if service_of(one) in services}
            states = {name: one["State"] for name, one in found.items()}
            ended = [name for name, state in states.items() if state["Status"] == "exited"]  # type: ignore[index]
            if ended:
                raise PlaceError(f"{ended[0]} ended: docker compose logs --tail 50 {ended[0]}")
            late = [name for name, state in states.items() if not healthy(state)]
            if not late:
                return
            looping = [name for name in late if int(str(found[name]["RestartCount"])) >= MOST_RESTARTS]
            if looping:
                raise PlaceError(f"{looping[0]} keeps ending: docker compose logs --tail 50 {looping[0]}")
            if time.monotonic() > deadline:
                raise PlaceError(
                    f"{', '.join(late)} did not become healthy within {seconds:.0f} s: docker compose logs"
                )
            time.sleep(2)  # asking costs a fiftieth of a second of the processor that an engine may need to start

    def _label(self) -> str:
        return f"label=com.docker.compose.project={self.project}"

    def _carrier(self, verb: str, names: list[str]) -> list[str]:
        present = self.volumes()
        mounts = [word for name in names for word in ("--volume", f"{present[name]}:/carried/{name}")]
        return [
            "docker", "run", "--rm", "--interactive", "--network", "none", "--user", "0:0",
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
            *(f"--cap-add={name}" for name in ("DAC_OVERRIDE", "CHOWN", "FOWNER")), "--log-driver", "none",
            *mounts, "--entrypoint", "python3", self._image(),
            "-c", CARRIER.read_text(), verb, *(f"{name}=/carried/{name}" for name in names),
        ]  # fmt: skip

    def _image(self) -> str:
        if self.image:
            return self.image
        for one in self.containers():
            if service_of(one) == "gateway":
                return str(one["Image"])
        name = f"{setting('APPLIANCE_PREFIX') or 'appliance'}/gateway:{setting('APPLIANCE_VERSION') or 'dev'}"
        labels = ("--filter", self._label(), "--filter", "label=com.docker.compose.service=gateway")
        # What came with a bundle may bear another project's label: it is known by its name.
        images = [
            image
            for filters in (labels, ("--filter", f"reference={name}"))
            for image in run("docker", "image", "ls", "-q", *filters).split()
        ]
        if not images:
            raise PlaceError(f"project {self.project} has no gateway image: docker compose build gateway")
        return images[0]


@dataclass
class LocalPlace:
    """The appliance as processes of this machine, its data under the state folder."""

    state: Path
    mode: str = "local"

    def folders(self) -> dict[str, Path]:
        """The folders that are kept, by name."""
        return {name: self.state / name for name in KEPT if (self.state / name).is_dir()}

    def running(self) -> list[str]:
        # Whoever runs the gateway has its ledger open; that is the fact that matters here.
        ledger = self.state / "gateway-data" / "gateway.sqlite3"
        return ["gateway"] if ledger.exists() and open_by_others(ledger) else []

    def restart(self, *services: str) -> None:
        if self.running():
            self.stop()
            self.start()

    def export(self, names: Iterable[str] = KEPT) -> "subprocess.Popen[bytes]":
        folders = self.folders()
        if not folders:
            raise PlaceError(f"{self.state} holds no data; has `make up` ever run?")
        named = [f"{name}={folder}" for name, folder in folders.items() if name in names]
        return subprocess.Popen(["python3", CARRIER, "export", *named], stdout=subprocess.PIPE)

    def replace(self, state: IO[bytes], names: Iterable[str]) -> None:
        for name in names:
            (self.state / name).mkdir(parents=True, exist_ok=True)
        run("python3", CARRIER, "import", *(f"{name}={self.state / name}" for name in names), stdin=state)

    def stop(self) -> None:
        # Supervisors have a file each while they run; one of them may have only the monitoring (`make monitoring`).
        if self.running() or any((self.state / "run").glob("*.json")):
            run(REPOSITORY / "scripts" / "down")

    def start(self) -> None:
        run(REPOSITORY / "scripts" / "up", quiet=False)


def open_by_others(path: Path) -> bool:
    """Whether any process of this machine has the file open."""
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            held = descriptor.stat()
        except OSError:
            continue  # it has just been closed, or is not ours to see
        if (held.st_dev, held.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def service_of(container: dict[str, object]) -> str:
    """The Compose service that a container belongs to."""
    return str(container["Config"]["Labels"]["com.docker.compose.service"])  # type: ignore[index]


def healthy(state: object) -> bool:
    """Whether Docker's state of a container says so; one without a health check need only run."""
    assert isinstance(state, dict)
    return bool(state["Running"] and state.get("Health", {"Status": "healthy"})["Status"] == "healthy")


def restarts(container: dict[str, object]) -> bool:
    """Whether a container is one that should always run."""
    return container["HostConfig"]["RestartPolicy"]["Name"] not in ("", "no")  # type: ignore[index]


def project_name() -> str:
    """The Compose project: COMPOSE_PROJECT_NAME, or the name in compose.yaml."""
    return setting("COMPOSE_PROJECT_NAME") or usual_name()


def usual_name() -> str:
    """The project's name where the operator chooses none."""
    for line in (REPOSITORY / "compose.yaml").read_text().splitlines():
        if line.startswith("name:"):
            return line.partition(":")[2].strip().removeprefix("${COMPOSE_PROJECT_NAME:-").removesuffix("}")
    raise PlaceError("compose.yaml has no name; set COMPOSE_PROJECT_NAME")


def find() -> Place:
    """The appliance of this checkout: what MODE says, else what `make up` started last, else what has data here."""
    mode = setting("MODE") or str(last_started().get("mode", ""))
    if mode not in ("", "gpu", "cpu", "local"):
        raise PlaceError(f"MODE={mode} is none of gpu, cpu, local")
    silent = ""
    if mode != "local" and shutil.which("docker"):
        place = ComposePlace(project_name())
        try:
            if place.volumes() or mode:
                return place
        except PlaceError as problem:
            silent = f"Docker cannot be asked what it holds: {problem}; systemctl start docker, or MODE=local"
    elif mode in ("gpu", "cpu"):
        silent = f"the appliance runs in Docker (MODE={mode}), which is not installed here"
    if mode in ("", "local") and any((STATE / name).is_dir() for name in KEPT):
        return LocalPlace(STATE)
    raise PlaceError(silent or "no appliance found: `make up` starts one")


def last_started() -> dict[str, object]:
    """What `make up` or `make upgrade` noted last; empty when that cannot be read, as after a full disk."""
    try:
        noted = json.loads((STATE / "deployed.json").read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def told(verb: Callable[[], int]) -> int:
    """Runs a verb; what went wrong becomes one line and status 1."""
    from scripts.daytwo.archive import BackupError

    try:
        return verb()
    except (PlaceError, BackupError) as problem:
        print(f"error: {problem}", flush=True)
    except OSError as problem:  # a full disk, a folder of somebody else, a program that is missing
        print(f"error: {problem.filename or 'writing'}: {problem.strerror or problem}", flush=True)
    return 1
