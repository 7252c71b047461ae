"""`make bundle` and `make load`: the appliance on a medium. They take minutes, because the engine starts again."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stack.appliance import REPOSITORY, STANDIN, Appliance
from tests.stack.test_daytwo import make
from tests.stack.waiting import until

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long]


@pytest.fixture
def island(docker: list[str], tmp_path: Path) -> Iterator[Appliance]:
    """A machine without any network: its own Docker Engine in a network namespace that holds nothing but itself."""
    cache = tmp_path / "docker"
    cache.mkdir()
    engine = subprocess.run(
        ["bash", "-c", '. scripts/standin/cache.sh; printf %s "$cache"'],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in ("tools", "config"):
        (cache / name).symlink_to(Path(engine) / name)
    environment = {**os.environ, "APPLIANCE_CACHE": str(cache)}
    script = f"ip link set lo up; exec {STANDIN} start"
    with (tmp_path / "start.log").open("w") as log:  # a pipe would be held open by the daemon
        words = ["unshare", "--net", "sh", "-c", script]
        subprocess.run(words, env=environment, check=True, timeout=120, stdout=log, stderr=log)
    one = Appliance(left_out=docker, settings={"APPLIANCE_CACHE": str(cache)})
    yield one
    subprocess.run([STANDIN, "stop"], env=environment, check=True, timeout=300)
    shutil.rmtree(cache)


def test_an_appliance_starts_from_a_bundle_without_any_network(
    appliance: Appliance, island: Appliance, tmp_path: Path
) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("a bundle holds the checkout as committed; this is no git checkout")
    medium = tmp_path / "medium"
    wanted = " ".join(name for name in appliance.services())
    told = make(appliance, "bundle", tmp_path, TO=str(medium), SERVICES=wanted)
    assert told.endswith("status 0"), told
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=medium, check=True)

    told = make(island, "load", tmp_path, FROM=str(medium), APPLIANCE_PREFIX="appliance-proof")
    assert told.endswith("status 0"), told
    island.compose("up", "--detach", "--no-build", "--pull", "never", *appliance.services(), seconds=900)
    daemon = island.run("bash", "-c", '. scripts/standin/cache.sh; cat "$runtime/docker.pid"').strip()

    def inside(*words: str) -> str:
        address = f"https://127.0.0.1:{island.settings['HTTPS_PORT']}"
        asked = ("curl", "-sk", "--max-time", "120", address + words[0], *words[1:])
        command = ["nsenter", "--net", "--target", daemon, *asked]
        return subprocess.run(command, capture_output=True, text=True).stdout

    until("a call would be admitted", lambda: '"ready"' in inside("/ready", "-f"), 600)
    key = island.create_key("island")["secret"]
    body = {"model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 32}
    body["messages"] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = inside("/v1/chat/completions", "-H", f"Authorization: Bearer {key}", "--json", json.dumps(body))
    assert "The capital of France is Paris." in answer

    state = tmp_path / "state"
    (state / "backups").mkdir(parents=True)
    told = make(island, "uninstall", state, YES="1")
    assert told.endswith("status 0"), told
    label = f"label=com.docker.compose.project={island.project}"
    for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls")):
        assert island.docker(*kind, "--quiet", "--filter", label) == ""
    assert [path.name for path in state.iterdir()] == ["backups"]


def test_a_damaged_bundle_is_not_loaded(tmp_path: Path, appliance: Appliance) -> None:
    medium = tmp_path / "medium"
    medium.mkdir()
    (medium / "images.tar").write_text("not what was promised")
    (medium / "SHA256SUMS").write_text(f"{'0' * 64}  images.tar\n")
    told = make(appliance, "load", tmp_path, FROM=str(medium))
    assert told.endswith("status 1")
    assert "missing or damaged" in told


@pytest.fixture
def workshop(docker: list[str]) -> Iterator[Appliance]:
    """A project in which nothing runs, with images of its own: a bundle is made there, and nobody's image changes."""
    one = Appliance(left_out=docker, settings={"APPLIANCE_PREFIX": "appliance-workshop"})
    yield one
    one.down()
    if images := one.docker("image", "ls", "--quiet", "--filter", "reference=appliance-workshop/*").split():
        one.docker("image", "rm", "--force", *set(images))


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_models_in_a_folder_are_carried_to_a_folder(workshop: Appliance, tmp_path: Path) -> None:
    medium, here, there = (tmp_path / name for name in ("medium", "here", "there"))
    here.mkdir()
    told = make(workshop, "bundle", tmp_path, TO=str(medium), SERVICES="gateway", MODEL_CACHE_DIR=str(here))
    assert told.endswith("status 0"), told
    carried = files(here)
    assert any(name.endswith(".safetensors") for name in carried), carried.keys()
    told = make(workshop, "load", tmp_path, FROM=str(medium), MODEL_CACHE_DIR=str(there))
    assert told.endswith("status 0"), told
    assert files(there) == carried
    label = f"label=com.docker.compose.project={workshop.project}"
    assert f"{workshop.project}_models" not in workshop.docker("volume", "ls", "--quiet", "--filter", label).split()
