"""The Compose file walked as data: what holds for every service, read where an operator would read it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts.local import example, mounted
from scripts.local.places import Places

ROOT = Path(__file__).resolve().parents[2]

LONG_RUNNING = {
    "nginx", "gateway", "vllm", "gpu-exporter", "prometheus", "alertmanager", "grafana", "jaeger", "loki",
    "promtail", "docker-socket-proxy", "certificate-keeper",
}  # fmt: skip
ONE_SHOT = {"init", "model"}
# Root only where a file or an image leaves no choice, each with its reason in compose.yaml.
ROOT_ALLOWED = {"init", "certificate-keeper", "docker-socket-proxy", "promtail"}
OWN_IMAGE = "${APPLIANCE_PREFIX:-appliance}/"  # how the name of an image that is built begins
CAPABILITIES = {
    "init": {"CHOWN", "DAC_OVERRIDE", "FOWNER"},
    "certificate-keeper": {"CHOWN", "DAC_OVERRIDE", "FOWNER"},
}


class _ComposeLoader(yaml.SafeLoader):
    """YAML with Compose's own tags."""


_ComposeLoader.add_constructor("!reset", lambda loader, node: "RESET")
_ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_mapping(node))


def load(name: str) -> dict[str, Any]:
    """One Compose file as data, before interpolation."""
    loaded = yaml.load((ROOT / name).read_text(), Loader=_ComposeLoader)  # a SafeLoader
    assert isinstance(loaded, dict)
    return loaded


COMPOSE = load("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
every_service = pytest.mark.parametrize("name", sorted(SERVICES))


def seconds(text: str) -> int:
    """Compose's `90s` or `2m` in seconds."""
    number, unit = re.fullmatch(r"(\d+)([smh])", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60, "h": 3600}[unit]


def test_all_services_are_there() -> None:
    assert set(SERVICES) == LONG_RUNNING | ONE_SHOT


@every_service
def test_hardening(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert set(service.get("cap_add", [])) == CAPABILITIES.get(name, set())
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service
    assert service.get("network_mode", "none") == "none"
    assert "pid" not in service
    assert "ipc" not in service
    uid = str(service["user"]).split(":")[0]
    assert (uid == "0") == (name in ROOT_ALLOWED)


@every_service
def test_bounds(name: str) -> None:
    service = SERVICES[name]
    assert service["mem_limit"]
    assert service["pids_limit"] > 0
    options = service["logging"]["options"]
    assert options["max-size"]
    assert int(options["max-file"]) > 1
    # The path of a request shares the processors freely; what only watches must not take them away.
    assert ("cpus" in service) == (name not in ONE_SHOT | {"nginx", "gateway", "vllm"})
    # Docker refuses a limit above the machine's processors.
    assert service.get("cpus", 1) <= 1


@pytest.mark.parametrize("name", sorted(LONG_RUNNING))
def test_long_running_services_are_watched_and_come_back(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    health = service["healthcheck"]
    assert health["test"][0] == "CMD"
    assert seconds(health["start_interval"]) <= 2
    assert seconds(health["interval"]) >= 30
    assert seconds(service["stop_grace_period"]) > 0


@pytest.mark.parametrize("name", sorted(ONE_SHOT))
def test_one_shots_end(name: str) -> None:
    assert SERVICES[name]["restart"] == "no"


def test_only_the_edge_is_published() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    for name, ports in published.items():
        for port in ports:
            if name == "nginx":
                assert port.startswith("${EDGE_ADDRESS:-0.0.0.0}:")
            else:
                assert port.startswith("127.0.0.1:"), f"{name} is published to the world: {port}"
    assert set(published) == {"nginx", "prometheus", "alertmanager", "grafana", "jaeger", "loki"}
    assert all("expose" not in service for service in SERVICES.values())


def test_the_engine_has_no_way_out_and_the_edge_no_way_to_it() -> None:
    assert SERVICES["vllm"]["networks"] == ["engine"]
    assert COMPOSE["networks"]["engine"] == {"internal": True}
    assert "engine" not in SERVICES["nginx"]["networks"]
    assert SERVICES["model"]["networks"] == ["download"]


def test_only_the_filter_sees_dockers_socket() -> None:
    mounts = {name for name, service in SERVICES.items() if "docker.sock" in str(service.get("volumes"))}
    assert mounts == {"docker-socket-proxy"}
    assert COMPOSE["networks"]["docker-api"] == {"internal": True}
    users = {name for name, service in SERVICES.items() if "docker-api" in service.get("networks", [])}
    assert users == {"promtail", "docker-socket-proxy"}
    allowed = [word for word in SERVICES["docker-socket-proxy"]["command"] if word.startswith("-allow")]
    assert not [word for word in allowed if re.match(r"-allow(POST|PUT|DELETE|PATCH)", word)]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1.51/containers/json", True),
        ("/version", True),
        ("/v1.51/containers/0123abcdef/json", True),
        ("/v1.51/containers/0123abcdef/logs", True),
        ("/v1.51/containers/0123abcdef/archive", False),
        ("/v1.51/containers/0123abcdef/exec", False),
        ("/v1.51/images/json", False),
        ("/v1.51/secrets", False),
        ("/v1.51/volumes", False),
        ("/v1.51/containers/../images/json", False),
    ],
)
def test_what_the_filter_lets_through(path: str, allowed: bool) -> None:
    words = SERVICES["docker-socket-proxy"]["command"]
    patterns = [word.removeprefix("-allowGET=") for word in words if word.startswith("-allowGET=")]
    assert any(re.fullmatch(pattern, path) for pattern in patterns) == allowed


def test_every_mounted_file_of_ours_is_watched_for_changes() -> None:
    read = {
        name: tuple(mount.split(":")[0].removeprefix("./") for mount in service.get("volumes", []) if mount[:2] == "./")
        for name, service in SERVICES.items()
    }
    assert {name: paths for name, paths in read.items() if paths} == mounted.READ_BY


def test_a_file_that_is_changed_added_or_removed_is_told(tmp_path: Path) -> None:
    for folder in {path.split("/")[0] for paths in mounted.READ_BY.values() for path in paths}:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    where = Places(tmp_path / "state")
    assert mounted.stale(where, mounted.digests(tmp_path)) == set(mounted.READ_BY)

    def told(path: str, text: str | None) -> set[str]:
        mounted.note(where, mounted.digests(tmp_path))
        assert mounted.stale(where, mounted.digests(tmp_path)) == set()
        (tmp_path / path).unlink() if text is None else (tmp_path / path).write_text(text)
        return mounted.stale(where, mounted.digests(tmp_path))

    assert told("prometheus/rules/own.yml", "groups: []\n") == {"prometheus"}
    assert told("prometheus/rules/own.yml", "groups:\n") == {"prometheus"}
    assert told("prometheus/rules/own.yml", None) == {"prometheus"}
    assert told("loki/loki.yml", "x") == {"loki"}
    assert told("nginx/start.sh", "#!/bin/sh\n") == {"nginx"}
    assert told("grafana/provisioning/datasources/own.yml", "x") == {"grafana"}
    assert told("nginx/nginx.conf.in", "x") == set(), "`init` reads that"


def test_running_calls_may_end_before_docker_kills() -> None:
    drain_seconds = 30  # DRAIN_SECONDS' default
    for name in ("nginx", "gateway", "vllm"):
        assert seconds(SERVICES[name]["stop_grace_period"]) > drain_seconds
    assert SERVICES["nginx"]["stop_signal"] == "SIGQUIT"


def test_start_order_by_health() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how == {"condition": wanted}, f"{name} does not wait for {needed} by health"
        if name not in {"init", "docker-socket-proxy", "gpu-exporter"}:
            assert "init" in service["depends_on"]
    assert {"gateway", "init"} == set(SERVICES["nginx"]["depends_on"])
    assert {"model", "init"} == set(SERVICES["vllm"]["depends_on"])


def test_images_are_pinned_once_and_each_has_a_variable() -> None:
    for name, reference in COMPOSE["x-images"].items():
        variable, tag = re.fullmatch(r"\$\{([A-Z_]+):-([^}]+)\}", reference).groups()  # type: ignore[union-attr]
        assert variable == f"{name.upper().replace('-', '_')}_IMAGE"
        assert re.search(r":v?\d+(\.\d+)+", tag), f"{tag} is not pinned by a version"
    pulled = set(COMPOSE["x-images"].values())
    for name, service in SERVICES.items():
        image = service["image"]
        if not image.startswith(OWN_IMAGE):
            assert image in pulled, f"{name}: {image} is not in x-images"
            assert "build" not in service


@pytest.mark.parametrize(
    "files",
    [
        ("compose.yaml",),
        ("compose.yaml", "compose.cpu.yaml"),
        ("compose.yaml", "compose.ray-head.yaml"),
        ("compose.ray-worker.yaml",),
    ],
    ids=" ".join,
)
def test_each_image_of_ours_is_built_by_one_service(files: tuple[str, ...]) -> None:
    """Two builders of one name take it from each other: an unchanged engine would be made anew and start again."""
    images: dict[str, str] = {}
    building: set[str] = set()
    for services in (load(name)["services"] for name in files):
        for name, service in services.items():
            images[name] = service.get("image", images.get(name))
            building |= {name} if "build" in service else set()
    builders: dict[str, list[str]] = {image: [] for image in images.values() if image.startswith(OWN_IMAGE)}
    for name in building:
        builders[images[name]].append(name)
    assert builders
    assert {len(names) for names in builders.values()} == {1}, builders


def test_tensor_parallelism_has_its_shared_memory_and_gpus() -> None:
    vllm = SERVICES["vllm"]
    assert vllm["shm_size"] == "${ENGINE_SHM:-16gb}"
    [device] = vllm["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${TP_SIZE:-2}", "capabilities": ["gpu"]}
    assert vllm["environment"]["TP_SIZE"] == "${TP_SIZE:-2}"


def test_the_cpu_form_takes_the_gpus_away_and_changes_nothing_else() -> None:
    cpu = load("compose.cpu.yaml")["services"]
    reserving = {name for name, service in SERVICES.items() if "deploy" in service}
    assert {name for name, service in cpu.items() if service.get("deploy") == "RESET"} == reserving
    touched = {key for service in cpu.values() for key in service}
    assert touched <= {"image", "build", "environment", "shm_size", "mem_limit", "ulimits", "deploy"}


def test_no_secret_stands_in_an_environment_where_a_file_would_do() -> None:
    for name in ("gateway", "vllm", "grafana"):
        environment = SERVICES[name]["environment"]
        for variable in ("VLLM_API_KEY", "GATEWAY_ADMIN_KEY", "GF_SECURITY_ADMIN_PASSWORD", "HF_TOKEN"):
            assert variable not in environment


@pytest.mark.parametrize("file", ["compose.yaml", "compose.ray-worker.yaml"])
def test_the_download_is_told_which_model_and_how_to_reach_it(file: str) -> None:
    environment = load(file)["services"]["model"]["environment"]
    wanted = {"MODEL_NAME", "MODEL_REVISION", "HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "NO_PROXY"}
    assert wanted <= set(environment)


def test_every_variable_is_in_the_example_with_its_default() -> None:
    """`.env.example` names each variable of the Compose files, with the default that holds."""
    text = (ROOT / "compose.yaml").read_text()
    uncommented = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    used = dict(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?-([^}]*)\}", uncommented))
    passed = {
        variable
        for service in SERVICES.values()
        for variable, value in service.get("environment", {}).items()
        if value is None
    }
    example = (ROOT / ".env.example").read_text()
    told = dict(re.findall(r"^#? ?([A-Z][A-Z0-9_]*)=(.*)$", example, re.MULTILINE))
    assert (set(used) | passed) - set(told) == set()
    differing = {name: (told[name], default) for name, default in used.items() if told[name] != default}
    assert differing == {}


@pytest.mark.parametrize(("service", "module"), sorted(example.SERVICES.items()))
def test_every_setting_of_a_service_can_be_given_to_its_container(service: str, module: str) -> None:
    environment = set(SERVICES[service]["environment"])
    missing = {name for name in example.fields(module) if not {name, f"{name}_FILE"} & environment}
    assert missing <= example.FIXED


def test_the_files_follow_the_services_settings() -> None:
    """`python -m scripts.local.example` has been run."""
    assert example.written(example.EXAMPLE.read_text()) == example.EXAMPLE.read_text()
    assert example.passed_on(example.COMPOSE.read_text()) == example.COMPOSE.read_text()
