"""A model over several machines: what each is told, what is refused, what its Compose files say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.unit.test_compose import _ComposeLoader

from engine import cluster, command
from engine.command import Place
from engine.settings import ConfigurationError, load

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
HEAD = {
    "DISTRIBUTED_EXECUTOR": "ray", "ENGINE_NODES": "2", "TP_SIZE": "2", "PP_SIZE": "2",
    "RAY_HEAD_ADDRESS": "10.20.0.11", "RAY_NODE_ADDRESS": "10.20.0.11", "RAY_TOKEN": TOKEN,
}  # fmt: skip
OTHER = {**HEAD, "RAY_NODE_ADDRESS": "10.20.0.12"}
PLACE = Place("gpu", "python3", Path("/models/m"), ("m",), 2, "eth1")


def test_the_first_machine_opens_the_cluster_and_the_others_join_it() -> None:
    common = "python3 -m ray.scripts.scripts start --block --disable-usage-stats"
    sizes = "--num-gpus=2 --num-cpus=2 --object-store-memory=536870912"
    assert " ".join(cluster.argv(load(HEAD), PLACE)) == (
        f"{common} --node-ip-address=10.20.0.11 {sizes} --head --port=6379 --include-dashboard=false"
    )
    assert " ".join(cluster.argv(load(OTHER), PLACE)) == (
        f"{common} --node-ip-address=10.20.0.12 {sizes} --address=10.20.0.11:6379"
    )


def test_vllm_is_told_to_go_through_ray_over_both_machines() -> None:
    words = " ".join(command.argv(load(HEAD), PLACE))
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2" in words
    assert "--distributed-executor-backend ray" in words


def test_the_cluster_has_a_token_and_each_machine_its_own_address_and_interface() -> None:
    env = command.environment(load({**OTHER, "VLLM_API_KEY": "k"}), PLACE, {"RAY_TOKEN": TOKEN}, Path("/s"), "t")
    assert (env["RAY_AUTH_MODE"], env["RAY_AUTH_TOKEN"], env["RAY_ADDRESS"]) == ("token", TOKEN, "10.20.0.11:6379")
    assert (env["VLLM_HOST_IP"], env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("10.20.0.12", "eth1", "eth1")
    assert "RAY_TOKEN" not in env
    assert {"VLLM_API_KEY", "ENGINE_PROGRESS_TOKEN"} & set(cluster.environment(load(OTHER), env)) == set()


def test_without_a_cluster_nothing_of_it_is_there() -> None:
    env = command.environment(load({}), PLACE, {}, Path("/s"), "t")
    assert [name for name in env if name.startswith("RAY_") or name == "VLLM_HOST_IP"] == []


def test_secrets_and_interfaces_are_not_handed_to_other_machines(tmp_path: Path) -> None:
    """vLLM reads the list from its configuration folder and would otherwise send its whole environment."""
    cluster.keep_here(tmp_path)
    env = command.environment(load(HEAD), PLACE, {}, tmp_path, "t")
    kept = json.loads((Path(env["VLLM_CONFIG_ROOT"]) / "ray_non_carry_over_env_vars.json").read_text())
    assert {"VLLM_API_KEY", "ENGINE_PROGRESS_TOKEN", "RAY_AUTH_TOKEN", "NCCL_SOCKET_IFNAME"} <= set(kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RAY_TOKEN": ""}, "RAY_TOKEN is missing"),
        ({"RAY_TOKEN": "short"}, "32 characters"),
        ({"RAY_NODE_ADDRESS": ""}, "RAY_NODE_ADDRESS is missing"),
        ({"RAY_NODE_ADDRESS": "8.8.8.8"}, "RAY_NODE_ADDRESS=8.8.8.8 is no IPv4 address of a private network"),
        ({"RAY_HEAD_ADDRESS": "node-a"}, "RAY_HEAD_ADDRESS=node-a is no IPv4 address"),
        ({"DISTRIBUTED_EXECUTOR": ""}, "needs DISTRIBUTED_EXECUTOR=ray"),
        ({"ENGINE_NODES": ""}, "needs ENGINE_NODES=2"),
        ({"PP_SIZE": "3"}, "PP_SIZE=3 must be a multiple of ENGINE_NODES=2"),
        ({"RAY_HEAD_ADDRESS": "", "RAY_NODE_ADDRESS": "", "RAY_TOKEN": ""}, "ENGINE_NODES above 1 needs"),
    ],
)
def test_contradictions_are_refused_before_anything_starts(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load({**HEAD, **changes})
    assert words in str(refused.value)
    assert TOKEN not in str(refused.value)


def test_the_interface_with_an_address_is_found() -> None:
    assert cluster.interface_of("127.0.0.1") == "lo"
    assert cluster.interface_of("203.0.113.7") is None


@pytest.mark.parametrize(("name", "service"), [("compose.ray-head.yaml", "vllm"), ("compose.ray-worker.yaml", "node")])
def test_the_compose_files_give_what_the_settings_need(name: str, service: str) -> None:
    loaded = yaml.load((ROOT / name).read_text(), Loader=_ComposeLoader)
    described = loaded["services"][service]
    given = {variable.removesuffix("_FILE") for variable in described["environment"]}
    assert {"RAY_HEAD_ADDRESS", "RAY_NODE_ADDRESS", "RAY_TOKEN", "ENGINE_NODES", "DISTRIBUTED_EXECUTOR"} <= given
    assert "RAY_TOKEN" not in described["environment"]  # a file, not a variable
    [built] = [one["build"] for one in loaded["services"].values() if "build" in one]
    assert built["args"]["WITH_RAY"] == "1"
    assert "ports" not in described
    assert loaded["networks"]["cluster"]["driver"] == "ipvlan"


def test_the_other_machine_is_as_hardened_as_the_first() -> None:
    services = yaml.load((ROOT / "compose.ray-worker.yaml").read_text(), Loader=_ComposeLoader)["services"]
    for service in services.values():
        assert (service["cap_drop"], service["read_only"], service["user"]) == (["ALL"], True, "10001:10001")
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["pids_limit"]
    assert services["node"]["networks"].keys() == {"cluster"}


def hosts(tmp_path: Path, **given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "hosts"],
        env={"PATH": os.environ["PATH"], "TO": str(tmp_path / "hosts"), **given},
        check=False,
        capture_output=True,
        text=True,
    )


def test_what_make_hosts_writes_is_what_the_engine_reads(tmp_path: Path) -> None:
    given = {"HEAD": "10.20.0.11", "WORKER": "10.20.0.12,10.20.0.13", "SUBNET": "10.20.0.0/24", "INTERFACE": "eth1"}
    done = hosts(tmp_path, **given)
    assert done.returncode == 0
    folder = tmp_path / "hosts"
    assert folder.stat().st_mode & 0o777 == 0o700
    token = (folder / "ray_token").read_text().strip()
    assert token not in done.stdout
    for name, address in (("head", "10.20.0.11"), ("worker-1", "10.20.0.12"), ("worker-2", "10.20.0.13")):
        lines = dict(line.split("=", 1) for line in (folder / f"{name}.env").read_text().splitlines())
        lines.setdefault("RAY_NODE_ADDRESS", lines["RAY_HEAD_ADDRESS"])
        settings = load({**lines, "RAY_TOKEN": token, "DISTRIBUTED_EXECUTOR": "ray", "TP_SIZE": "2", "PP_SIZE": "3"})
        assert (settings.ray_node_address, settings.engine_nodes) == (address, 3)
    again = hosts(tmp_path, **given)
    assert again.returncode == 0
    assert (folder / "ray_token").read_text().strip() == token  # machines that have it stay in


@pytest.mark.parametrize("own", [False, True])
def test_make_hosts_names_a_file_of_variables_only_if_it_is_there(tmp_path: Path, own: bool) -> None:
    """Compose ends with "couldn't find env file" at one that is not."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "hosts", tmp_path / "scripts")
    if own:
        (tmp_path / ".env").write_text("MODEL_NAME=x\n")
    given = {"HEAD": "10.20.0.11", "WORKER": "10.20.0.12", "SUBNET": "10.20.0.0/24", "INTERFACE": "eth1"}
    environment = {"PATH": os.environ["PATH"], "TO": str(tmp_path / "hosts"), **given}
    done = subprocess.run([script], env=environment, check=True, capture_output=True, text=True)
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("  docker compose ")]
    named = [[words[at + 1] for at, word in enumerate(words) if word == "--env-file"] for words in commands]
    first = [".env"] if own else []
    assert named == [[*first, f"{tmp_path}/hosts/head.env"], [*first, ".state/hosts/worker-1.env"]]
    assert ("with the same .env" in done.stdout) == own


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "HEAD is missing"),
        ({"HEAD": "1.2.3.4", "WORKER": "10.20.0.12"}, "1.2.3.4 is a public address"),
        ({"HEAD": "10.20.0.11", "WORKER": "10.21.0.12"}, "10.21.0.12 is not in SUBNET"),
        ({"HEAD": "10.20.0.11", "WORKER": "10.20.0.11"}, "given twice"),
        ({"HEAD": "10.20.0.11", "WORKER": "there"}, "there is no IPv4 address"),
        ({"HEAD": "10.20.0.11", "WORKER": "10.20.0.12", "SUBNET": "10.20.0.1/8"}, "is no network"),
    ],
)
def test_make_hosts_refuses_what_cannot_work(tmp_path: Path, given: dict[str, str], words: str) -> None:
    done = hosts(tmp_path, **{"SUBNET": "10.20.0.0/24", "INTERFACE": "eth1", **given})
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "hosts").exists()
