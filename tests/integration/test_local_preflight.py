"""Bad input to `make up`: one clear line each, a non-zero exit, and nothing half-started. Through scripts/up itself."""

from __future__ import annotations

import datetime as dt
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from scripts.local.places import ROOT
from services.init import certificate
from tests.doubles.ports import accepts, free_ports

PORTS = ("HTTPS_PORT", "HTTP_PORT", "EDGE_STATUS_PORT", "GATEWAY_PORT", "VLLM_PORT", "ENGINE_STATUS_PORT")
PORTS += ("GPU_EXPORTER_PORT", "PROMETHEUS_PORT")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Local mode on free ports with a state folder of its own, and nothing of this machine's engine."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    own = tmp_path / "own"
    own.mkdir()
    return {**kept, **ports, "MODE": "local", "APPLIANCE_STATE": str(tmp_path / "state"), "CERTIFICATES_DIR": str(own)}


def refused(environment: dict[str, str], *words: str, verb: str = "up", code: int = 2) -> list[str]:
    """Run a verb that must refuse; the lines it said. Nothing may have been made or be listening afterwards."""
    done = subprocess.run([ROOT / "scripts" / verb], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    for word in words:
        assert any(word in line for line in lines), f"{word!r} not in {lines}"
    assert not Path(environment["APPLIANCE_STATE"]).exists()
    listening = [name for name in PORTS if accepts(int(environment[name])) and environment[name].isdecimal()]
    assert listening == [name for name in PORTS if environment.get("TAKEN") == environment[name]]
    return lines


def test_a_good_environment_passes(environment: dict[str, str]) -> None:
    environment |= {"GATEWAY_MEMORY": "4g"}  # means nothing here, and is no mistake
    done = subprocess.run([ROOT / "scripts/preflight"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "nothing stands in the way" in done.stdout
    assert not Path(environment["APPLIANCE_STATE"]).exists()


def test_a_port_in_use_names_the_variable_and_the_program(environment: dict[str, str]) -> None:
    with socket.create_server(("0.0.0.0", int(environment["HTTPS_PORT"]))):
        environment["TAKEN"] = environment["HTTPS_PORT"]
        [line] = refused(environment, f"port {environment['HTTPS_PORT']} (HTTPS_PORT) cannot be used")
    assert f"pid {os.getpid()}" in line


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MODE": "both"}, "not one of gpu, cpu, local"),
        ({"TP_SIZE": "two"}, "TP_SIZE='two'"),
        ({"HTTPS_PROT": "8443", "EDGE_HTTPS": "1"}, "EDGE_HTTPS in the environment is not known"),
        ({"GATEWAY_ADMIN_KYE": "x"}, "did you mean GATEWAY_ADMIN_KEY?"),
        ({"EDGE_HSTS": "maybe"}, "neither true nor false"),
        ({"APPLIANCE_HOSTS": "a b"}, "APPLIANCE_HOSTS"),
        ({"LETSENCRYPT_EMAIL": "a@example.com", "APPLIANCE_HOSTS": "a.test"}, "local mode cannot ask Let's Encrypt"),
        ({"UP_SECONDS": "soon"}, "UP_SECONDS"),
        ({"VLLM_API_KEY": "a", "VLLM_API_KEY_FILE": "/b"}, "are both set"),
        ({"HF_TOKEN_FILE": "/no/such/file"}, "HF_TOKEN_FILE: cannot read /no/such/file: No such file"),
        ({"DATABASE_URL_FILE": "/no/such/file"}, "DATABASE_URL_FILE: cannot read /no/such/file: No such file"),
        ({"GATEWAY_PORT_FILE": "/b"}, "GATEWAY_PORT_FILE in the environment is not known"),
        ({"MODEL_NAME": "/no/such/folder"}, "no model in that folder"),
    ],
)
def test_variables_that_cannot_be_meant(environment: dict[str, str], variables: dict[str, str], words: str) -> None:
    refused({**environment, **variables}, words)


def test_two_equal_ports_and_a_bad_one_are_told_together(environment: dict[str, str]) -> None:
    environment |= {"GATEWAY_PORT": environment["VLLM_PORT"], "HTTPS_PORT": "https"}
    done = subprocess.run([ROOT / "scripts/up"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "HTTPS_PORT: 'https' is not a whole number" in done.stderr
    assert "they must differ" in done.stderr


def test_an_unreadable_certificate(environment: dict[str, str]) -> None:
    own = Path(environment["CERTIFICATES_DIR"])
    (own / certificate.CHAIN).write_text("not a certificate")
    (own / certificate.KEY).mkdir()
    refused(environment, "privkey.pem cannot be read")


def test_a_certificate_with_another_key(environment: dict[str, str]) -> None:
    own = Path(environment["CERTIFICATES_DIR"])
    now = dt.datetime.now(dt.UTC)
    (own / certificate.CHAIN).write_bytes(certificate.self_signed((), now)[0])
    (own / certificate.KEY).write_bytes(certificate.self_signed((), now)[1])
    refused(environment, "is not the key of the first certificate")


def docker_double(folder: Path, script: str) -> str:
    """A `docker` first on PATH that behaves as told."""
    folder.mkdir()
    double = folder / "docker"
    double.write_text(f"#!/bin/sh\n{script}\n")
    double.chmod(double.stat().st_mode | stat.S_IXUSR)
    return f"{folder}:{os.environ['PATH']}"


def test_docker_without_permission(environment: dict[str, str], tmp_path: Path) -> None:
    denied = 'echo "permission denied while trying to connect to the Docker daemon socket" >&2; exit 1'
    environment |= {"PATH": docker_double(tmp_path / "bin", denied), "MODE": ""}
    [line] = refused(environment, "refuses this user")
    assert "usermod -aG docker" in line


def gpu_machine(folder: Path, gpus: int, info: str = '28.5.2|/var/lib/docker|{"nvidia":{}}') -> str:
    """A machine with Docker and so many GPUs."""
    path = docker_double(
        folder,
        f"""case "$1 $2" in "compose version") echo 2.40.3;; "info --format") echo '{info}';; *) exit 1;; esac""",
    )
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {number}: NVIDIA H100'\n" for number in range(gpus)))
    smi.chmod(0o755)
    return path


def test_fewer_gpus_than_tp_size(environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {"PATH": gpu_machine(tmp_path / "bin", 1), "MODE": "gpu", "TP_SIZE": "2"}
    [line] = refused(environment, "asks for 2 GPUs, this machine shows 1")
    assert "TP_SIZE=1" in line


def test_an_old_compose(environment: dict[str, str], tmp_path: Path) -> None:
    path = gpu_machine(tmp_path / "bin", 2)
    docker = tmp_path / "bin" / "docker"
    docker.write_text(docker.read_text().replace("2.40.3", "2.17.0"))
    refused({**environment, "PATH": path, "MODE": "cpu"}, "Compose plugin is 2.17")


def test_a_state_folder_that_cannot_be_one(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused({**environment, "APPLIANCE_STATE": str(tmp_path / "file" / "state")}, "cannot be written")


def test_no_room(environment: dict[str, str], tmp_path: Path) -> None:
    """A file system of 1 MiB, where the machine lets us mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        refused({**environment, "APPLIANCE_STATE": str(small / "state")}, "MiB are free")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("verb", ["status", "logs"])
def test_verbs_on_a_machine_where_nothing_runs(environment: dict[str, str], verb: str) -> None:
    done = subprocess.run([ROOT / "scripts" / verb], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "make up" in done.stdout + done.stderr


def test_down_where_nothing_runs_is_fine(environment: dict[str, str]) -> None:
    done = subprocess.run([ROOT / "scripts/down"], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
