"""The machine: memory, disk, clock, GPUs, Docker, ports."""

import ctypes
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts.daytwo.doctor.finding import Finding, note, ok, wrong
from scripts.daytwo.doctor.situation import Situation

GIB = 1 << 30
LEAST_MEMORY = 6 * GIB  # the engine's CPU build with the embedded model peaks near 4 GiB
LEAST_DISK = 20 * GIB  # images 12 GiB, the rest for data
COMPOSE_NEEDED = (2, 24, 4)  # `!reset` and `!override` in compose.cpu.yaml
ENGINE_NEEDED = (25, 0, 0)  # healthcheck.start_interval
PATIENCE = 20  # seconds for one question to a program
_TIME_ERROR = 5  # adjtimex's answer for a clock that nothing keeps right


def said(*command: str) -> str | None:
    """A command's output, or None when it is missing or fails."""
    return asked(*command)[0]


def asked(*command: str) -> tuple[str | None, str]:
    """A command's output, or None and the last line of what it said when it is missing, fails, or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {PATIENCE} s"
    except OSError as problem:
        return None, problem.strerror or str(problem)
    reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return (done.stdout.strip(), "") if done.returncode == 0 else (None, reason)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparison."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def memory(_: Situation) -> Iterator[Finding]:
    """Memory in the machine."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    told = f"{total / GIB:.0f} GiB of memory, {available / GIB:.0f} GiB free"
    if total < LEAST_MEMORY:
        yield wrong("memory", f"{told}; the engine needs {LEAST_MEMORY // GIB} GiB", "use a machine with more memory")
    else:
        yield ok("memory", told)


def disk(situation: Situation) -> Iterator[Finding]:
    """Free space where data is kept."""
    folders = {situation.repository}
    if root := said("docker", "info", "--format", "{{.DockerRootDir}}"):
        folders.add(Path(root))
    seen = set()
    for folder in sorted(folders):
        while not folder.exists():
            folder = folder.parent
        if folder.stat().st_dev in seen:
            continue
        seen.add(folder.stat().st_dev)
        usage = shutil.disk_usage(folder)
        told = f"{usage.free / GIB:.0f} GiB free of {usage.total / GIB:.0f} GiB at {folder}"
        if usage.free < GIB or usage.free < usage.total * 0.02:
            yield wrong("disk", told, "free some: docker image prune; old backups in .state/backups")
        elif usage.free < LEAST_DISK:
            yield note("disk", f"{told}: little for a first start", "docker image prune")
        else:
            yield ok("disk", told)


def clock(_: Situation) -> Iterator[Finding]:
    """Whether something keeps the clock right: certificates, quotas and limits depend on it."""
    buffer = ctypes.create_string_buffer(512)  # struct timex, all zero: read, change nothing
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    if state in (-1, _TIME_ERROR):
        yield note("clock", "nothing keeps this machine's clock right", "timedatectl set-ntp true")
    else:
        yield ok("clock", "synchronised")


def gpus(situation: Situation) -> Iterator[Finding]:
    """NVIDIA GPUs, and whether Docker can hand them to containers."""
    listed = said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if listed is None:
        verdict = "no NVIDIA GPU answers; the CPU form with a small model runs here"
        if situation.settings.get("MODE") == "gpu":
            yield wrong("gpu", "MODE=gpu, but nvidia-smi does not answer", "install the NVIDIA driver, or MODE=cpu")
        else:
            yield note("gpu", verdict)
        return
    lines = listed.splitlines()
    yield ok("gpu", f"{len(lines)} GPU: {'; '.join(lines)}")
    wanted = int(situation.settings.get("TP_SIZE") or 2)
    if len(lines) < wanted:
        yield wrong("gpu", f"TP_SIZE={wanted}, but {len(lines)} GPU is here", f"put TP_SIZE={len(lines)} into .env")
    described = said("docker", "info", "--format", "{{json .Runtimes}}{{json .CDISpecDirs}}")
    if described is not None and "nvidia" not in described and not list(Path("/etc/cdi").glob("*nvidia*")):
        mend = "install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker"
        yield wrong("gpu", "Docker cannot hand GPUs to containers", mend)


def docker(situation: Situation) -> Iterator[Finding]:
    """Docker Engine and Compose, and whether compose.yaml is one they can run."""
    if shutil.which("docker") is None:
        yield note("docker", "not installed; MODE=local needs none")
        return
    engine, reason = asked("docker", "version", "--format", "{{.Server.Version}}")
    if engine is None:
        make = note if situation.local else wrong
        if "permission denied" in reason.lower():
            yield make("docker", "Docker Engine refuses this user", "sudo usermod -aG docker $USER, and log in again")
        else:
            yield make("docker", f"Docker Engine does not answer: {reason}", "systemctl start docker, or: MODE=local")
        return
    compose = said("docker", "compose", "version", "--short")
    if compose is None:
        yield wrong("docker", "the Compose plugin is missing", "install docker-compose-plugin")
        return
    for name, version, needed in (("Engine", engine, ENGINE_NEEDED), ("Compose", compose, COMPOSE_NEEDED)):
        least = ".".join(map(str, needed))
        if numbers(version) < needed:
            yield wrong("docker", f"{name} {version} is too old", f"upgrade Docker: {least} or newer")
        else:
            yield ok("docker", f"{name} {version}")
    done = subprocess.run(
        ["docker", "compose", "config", "-q"], cwd=situation.repository, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield wrong("docker", f"compose.yaml with these settings cannot be run: {reason}", "correct .env")


def ports(situation: Situation) -> Iterator[Finding]:
    """The published ports: ours, free, or somebody else's."""
    ours = bool(situation.place and situation.place.running())
    for name in ("HTTPS_PORT", "HTTP_PORT"):
        port = situation.port(name)
        with socket.socket() as probe:
            probe.settimeout(2)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        if taken and not ours:
            holder = listener(port) or "another program"
            yield wrong("ports", f"port {port} is taken by {holder}", f"stop it, or put {name}=… into .env")
        elif ours and not taken:
            yield wrong("ports", f"the appliance runs, but nothing answers on port {port}", "make logs; make up")
        else:
            yield ok("ports", f"port {port} {'is ours' if taken else 'is free'}")


def listener(port: int) -> str | None:
    """The name of the program that listens on a TCP port, as far as we may see it."""
    listed = said("ss", "-Hltnp", f"sport = :{port}") or ""
    found = re.search(r'\(\("([^"]+)",pid=(\d+)', listed)
    return f"{found[1]} (pid {found[2]})" if found else None


def alerts(situation: Situation) -> Iterator[Finding]:
    """What Prometheus finds alarming."""
    port = situation.settings.get("PROMETHEUS_PORT") or "9090"
    answer = said("curl", "-s", "--max-time", "5", f"http://127.0.0.1:{port}/api/v1/alerts")
    if not answer:
        yield note("alerts", "Prometheus does not answer; no alert is watched", "make monitoring")
        return
    told = [one for one in json.loads(answer)["data"]["alerts"] if one["state"] == "firing"]
    firing = [one for one in told if one["labels"].get("severity") != "heartbeat"]  # that one always fires
    for one in firing:
        runbook = one["annotations"].get("runbook_url", "docs/runbooks")
        yield wrong("alerts", f"{one['labels']['alertname']} is firing", f"see {runbook}")
    if not firing:
        yield ok("alerts", "none is firing")
