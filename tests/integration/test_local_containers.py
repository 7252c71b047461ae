"""`make up` with Docker, seen from Docker's side: which calls are made, in which order, and what a failure leaves."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.local.containers import OUTDATED
from scripts.local.places import ROOT
from services.init import certificate
from tests.doubles.ports import free_ports

PUBLISHED = (
    "HTTPS_PORT",
    "HTTP_PORT",
    "GRAFANA_PORT",
    "PROMETHEUS_PORT",
    "ALERTMANAGER_PORT",
    "JAEGER_PORT",
    "LOKI_PORT",
)


def container(service: str, state: str = "running", health: str = "healthy", code: int = 0) -> str:
    return json.dumps({"Service": service, "State": state, "Health": health, "ExitCode": code})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A machine with a Docker that does as the test says, and no GPU."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "docker").symlink_to(ROOT / "tests/doubles/docker.py")
    (tmp_path / "own").mkdir()
    (tmp_path / "certificate.pem").write_bytes(certificate.self_signed((), dt.datetime.now(dt.UTC))[0])
    (tmp_path / "ps").write_text(
        "\n".join([container("init", "exited", ""), container("gateway"), container("nginx"), container("vllm")])
    )
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "DOCKER_DOUBLE": str(tmp_path),
        "APPLIANCE_STATE": str(tmp_path / "state"), "CERTIFICATES_DIR": str(tmp_path / "own"),
        **dict(zip(PUBLISHED, map(str, free_ports(len(PUBLISHED))), strict=True)),
    }  # fmt: skip


def verb(environment: dict[str, str], name: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [ROOT / "scripts" / name, *words]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=240, check=False)


def calls(environment: dict[str, str]) -> list[str]:
    """What Docker was asked to do; questions left out."""
    path = Path(environment["DOCKER_DOUBLE"], "calls")
    lines = path.read_text().splitlines() if path.exists() else []
    asking = ("info", "ps ", "compose version", "compose ps", "compose config", "image inspect", "compose exec")
    return [line for line in lines if not line.startswith(asking)]


def test_up_builds_then_prepares_then_starts(environment: dict[str, str]) -> None:
    done = verb(environment, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mode cpu: Docker, but no NVIDIA GPU" in done.stdout
    assert "sk-made-by-the-double" in done.stdout
    assert '"model": "some-model"' in done.stdout
    verbs = [" ".join(line.split()[:4]) for line in calls(environment)]
    assert verbs[:4] == ["compose build", "compose run --rm init", "compose run --rm model", "compose up --detach"]
    deployed = json.loads(Path(environment["APPLIANCE_STATE"], "deployed.json").read_text())
    assert deployed["mode"] == "cpu"
    assert deployed["files"] == ["compose.yaml", "compose.cpu.yaml"]
    assert verb(environment, "status").returncode == 0
    assert verb(environment, "down").returncode == 0
    assert "compose down" in calls(environment)
    assert not Path(environment["APPLIANCE_STATE"], "deployed.json").exists()
    assert verb(environment, "status").returncode == 1


def test_a_certificate_that_the_world_trusts_needs_no_file(environment: dict[str, str]) -> None:
    public = {"LETSENCRYPT_EMAIL": "it@example.com", "APPLIANCE_HOSTS": "llm.example.com,other.example.com"}
    done = verb({**environment, **public}, "up")
    assert done.returncode == 0, done.stdout + done.stderr
    port = environment["HTTPS_PORT"]
    request = f"curl --resolve llm.example.com:{port}:127.0.0.1 https://llm.example.com:{port}/v1/chat/completions"
    assert request in done.stdout
    assert "--cacert" not in done.stdout


@pytest.mark.parametrize("step", ["compose build", "run --rm init", "run --rm model", "compose up", "compose cp"])
def test_a_step_that_fails_leaves_nothing_half_started(environment: dict[str, str], step: str) -> None:
    Path(environment["DOCKER_DOUBLE"], "fail").write_text(step)
    done = verb(environment, "up")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("up: ")
    assert calls(environment)[-1].startswith("compose down")
    assert not Path(environment["APPLIANCE_STATE"], "deployed.json").exists()


def test_a_service_that_ends_is_named(environment: dict[str, str]) -> None:
    ended = "\n".join([container("gateway"), container("vllm", "exited", "", 1)])
    Path(environment["DOCKER_DOUBLE"], "ps").write_text(ended)
    done = verb(environment, "up")
    assert done.returncode == 1
    assert "up: vllm ended" in done.stderr
    assert calls(environment)[-1].startswith("compose down")


def test_an_engine_that_gave_up_ends_the_wait_with_its_reason(environment: dict[str, str]) -> None:
    double = Path(environment["DOCKER_DOUBLE"])
    (double / "ps").write_text(container("vllm", "running", "starting"))
    (double / "engine").write_text(json.dumps({"state": "failed", "reason": "TP_SIZE=2 does not divide 9 heads"}))
    done = verb(environment, "up")
    assert done.returncode == 1
    assert "the engine failed, TP_SIZE=2 does not divide 9 heads" in done.stderr
    assert calls(environment)[-1].startswith("compose down")


def test_one_that_stays_unhealthy_ends_the_wait(environment: dict[str, str]) -> None:
    Path(environment["DOCKER_DOUBLE"], "ps").write_text(container("vllm", "running", "starting"))
    done = verb({**environment, "UP_SECONDS": "1"}, "up")
    assert done.returncode == 1
    assert "not healthy after" in done.stderr
    assert "vllm" in done.stderr


def test_a_compose_file_that_does_not_hold_is_refused_before_anything(environment: dict[str, str]) -> None:
    Path(environment["DOCKER_DOUBLE"], "fail").write_text("config --quiet")
    done = verb(environment, "up")
    assert done.returncode == 2
    assert "the double fails at config" in done.stderr
    assert calls(environment) == []


def test_given_secrets_that_changed_are_in_use_afterwards(environment: dict[str, str]) -> None:
    """To Compose nothing has changed: gateway and engine would be parted by the next restart of only one of them."""
    double = Path(environment["DOCKER_DOUBLE"])
    services = [container("gateway"), container("nginx"), container("vllm"), container("grafana")]
    (double / "ps").write_text("\n".join(services))
    assert verb(environment, "up").returncode == 0
    assert not any("restart" in line for line in calls(environment)), "who has read the present ones goes on"
    assert not (double / "input").exists(), "a password that is not given is Grafana's own affair"
    (double / "outdated").write_text("vllm gateway")

    done = verb({**environment, "GRAFANA_ADMIN_PASSWORD": "changed"}, "up")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "secrets have changed: restarting vllm and gateway" in done.stdout
    verbs = calls(environment)
    assert verbs.index("compose restart --no-deps vllm gateway") > verbs.index("compose up --detach")
    assert (double / "input").read_text() == "changed"
    assert "changed" not in "".join(verbs)


def test_who_reads_secrets_later_than_they_were_written_has_them(tmp_path: Path) -> None:
    """What is asked in a container: here of this machine's first process, which began before any of these files."""
    script = OUTDATED.replace("/run/secrets", str(tmp_path))
    secret = tmp_path / "vllm_api_key"
    secret.write_text("a secret")

    def told() -> str:
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    assert told() == "outdated"
    os.utime(secret, (0, 0))
    assert told() == "current"


def recreated(environment: dict[str, str]) -> list[str]:
    """The services that were made anew because of their files, call by call."""
    mark = "compose up --detach --no-deps --force-recreate "
    return [line.removeprefix(mark) for line in calls(environment) if line.startswith(mark)]


def test_a_changed_configuration_file_reaches_the_service_that_runs(environment: dict[str, str]) -> None:
    """Compose compares definitions, not the files in mounted folders: it would leave the old rules in effect."""
    double = Path(environment["DOCKER_DOUBLE"])
    everything = [container(name) for name in ("gateway", "nginx", "vllm", "loki", "prometheus")]
    (double / "ps").write_text("\n".join([*everything, container("promtail", "exited", "")]))
    assert verb(environment, "monitoring", "up").returncode == 0
    assert recreated(environment) == [], "what does not run reads its files when it starts"
    assert verb(environment, "monitoring", "up").returncode == 0
    assert recreated(environment) == [], "nothing changed"
    note = Path(environment["APPLIANCE_STATE"], "mounted.json")
    told = json.loads(note.read_text())
    assert "nginx" not in told, "nothing was started that reads it"
    note.write_text(json.dumps({**told, "prometheus": "of other rules", "promtail": "of another file"}))
    (double / "fail").write_text("--force-recreate")
    assert verb(environment, "monitoring", "up").returncode == 1
    assert json.loads(note.read_text())["prometheus"] == "of other rules", "it still has to be done"
    (double / "fail").unlink()
    assert verb(environment, "monitoring", "up").returncode == 0
    assert recreated(environment) == ["prometheus", "prometheus"]
    assert json.loads(note.read_text()) == told


def test_up_takes_changed_files_over_also_where_no_note_says_what_runs(environment: dict[str, str]) -> None:
    double = Path(environment["DOCKER_DOUBLE"])
    (double / "files").write_text(f"{ROOT / 'compose.yaml'},{ROOT / 'compose.cpu.yaml'}\n")
    (double / "ps").write_text("\n".join(container(name) for name in ("gateway", "nginx", "vllm", "loki")))
    assert verb(environment, "up").returncode == 0
    assert recreated(environment) == ["loki nginx"]
    assert verb(environment, "up").returncode == 0
    assert recreated(environment) == ["loki nginx"]


@pytest.mark.parametrize("name", ["up", "preflight"])
def test_a_secret_in_a_file_that_no_container_would_see_is_refused(environment: dict[str, str], name: str) -> None:
    """Unread, `DATABASE_URL_FILE` would mean SQLite, and the token of a gated model none."""
    done = verb({**environment, "DATABASE_URL_FILE": "/etc/database", "HF_TOKEN_FILE": "/etc/token"}, name)
    assert done.returncode == 2
    for variable in ("DATABASE_URL", "HF_TOKEN"):
        assert f"{name}: {variable}_FILE: a container does not see this file; give {variable} itself" in done.stderr
    assert calls(environment) == []


def test_a_load_test_finds_the_appliance_that_runs(environment: dict[str, str]) -> None:
    """Its URL and its certificate as it is now, also where it was started by hand."""
    double, state = Path(environment["DOCKER_DOUBLE"]), Path(environment["APPLIANCE_STATE"])
    (double / "files").write_text(f"{ROOT / 'compose.yaml'}\n")

    def where(environment: dict[str, str]) -> str:
        argv = [ROOT / ".venv/bin/python", "-m", "scripts.local", "where", "edge"]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    assert where(environment) == f"https://127.0.0.1:{environment['HTTPS_PORT']}\n{state / 'certificate.pem'}\n"
    assert (state / "certificate.pem").read_bytes() == (double / "certificate.pem").read_bytes()
    plain = {name: value for name, value in environment.items() if name != "HTTPS_PORT"}
    assert where(plain).startswith("https://127.0.0.1\n"), "what compose.yaml publishes"
    named = {**plain, "APPLIANCE_HOSTS": "llm.example.com", "LETSENCRYPT_EMAIL": "a@example.com"}
    assert where(named) == "https://llm.example.com\n\n", "everybody trusts that one"
    local = {**plain, "MODE": "local"}
    (state / "edge-certificates").mkdir()
    (state / "certificate.pem").rename(state / "edge-certificates/fullchain.pem")
    assert where(local) == f"https://127.0.0.1:8443\n{state / 'edge-certificates/fullchain.pem'}\n"


def test_a_load_test_where_none_is_found_says_so(environment: dict[str, str]) -> None:
    (Path(environment["DOCKER_DOUBLE"]) / "files").write_text(f"{ROOT / 'compose.yaml'}\n")
    (Path(environment["DOCKER_DOUBLE"]) / "fail").write_text("compose cp")
    argv = [ROOT / ".venv/bin/python", ROOT / "scripts/loadtest.d/run.py"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "loadtest: the certificate cannot be copied: the double fails at compose cp (make status)"
    )
    assert done.stderr.count("\n") == 1


def test_monitoring_alone(environment: dict[str, str]) -> None:
    assert verb(environment, "monitoring", "up").returncode == 0
    [line] = calls(environment)
    assert line.startswith("compose up --detach prometheus alertmanager grafana jaeger loki")
    assert " vllm" not in line
    assert verb(environment, "monitoring", "down").returncode == 0
    assert calls(environment)[-1].startswith("compose stop prometheus")


def test_keys_go_into_the_gateways_container(environment: dict[str, str]) -> None:
    assert verb(environment, "up").returncode == 0
    done = verb(environment, "keys", "list", "--json")
    assert json.loads(done.stdout) == {"data": []}


def test_what_was_started_by_hand_is_found(environment: dict[str, str]) -> None:
    """`docker compose up -d` leaves no note of ours; its containers say which files they came from."""
    double = Path(environment["DOCKER_DOUBLE"])
    (double / "files").write_text(f"{ROOT / 'compose.yaml'},{ROOT / 'compose.cpu.yaml'}\n")
    assert verb(environment, "status").returncode == 0
    assert json.loads(verb(environment, "keys", "list", "--json").stdout) == {"data": []}
    (double / "ps").write_text(container("prometheus"))
    assert verb(environment, "status").returncode == 1, "what only watches is no appliance"
    (double / "ps").write_text("\n".join([container("gateway"), container("vllm", health="starting")]))
    told = verb(environment, "status")
    assert told.returncode == 1
    assert "status: vllm is running, starting" in told.stdout
    assert "gateway is" not in told.stdout
    assert verb(environment, "down").returncode == 0
    assert calls(environment) == ["compose down"]


def test_keys_are_not_made_where_no_appliance_would_know_them(environment: dict[str, str]) -> None:
    done = verb(environment, "keys", "create", "--name", "me")
    assert done.returncode == 2
    assert done.stderr == "keys: no appliance found: `make up` starts one\n"
    assert not Path(environment["APPLIANCE_STATE"]).exists()


def test_a_docker_that_went_away_is_told_in_its_words(environment: dict[str, str]) -> None:
    assert verb(environment, "up").returncode == 0
    Path(environment["DOCKER_DOUBLE"], "fail").write_text("compose")
    for name in (["status"], ["keys", "list"]):
        done = verb(environment, *name)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "the double fails" in done.stderr


def test_a_full_disk_costs_no_key(environment: dict[str, str]) -> None:
    """The first key is shown once: it is made when nothing is left that can fail."""
    state = Path(environment["APPLIANCE_STATE"])
    (state / "deployed.json").mkdir(parents=True)  # a note that cannot be written, also for root
    done = verb(environment, "up")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"up: {state / 'deployed.json'}: Is a directory"
    made = Path(environment["DOCKER_DOUBLE"], "calls").read_text()
    assert "keys create" not in made
