"""`make load` of a medium that suffered on its way: told before anything is installed, whatever suffered."""

import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.doubles.daytwo_site import PROJECT, Site, container

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("appliance.tar", "bundle.json", "images.tar", "models.tar")


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    """A bundle as far as its checksums go."""
    folder = tmp_path / "medium"
    folder.mkdir()
    for name in PARTS:
        (folder / name).write_text(f"what {name} holds")
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in PARTS)
    (folder / "SHA256SUMS").write_text(sums)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    return folder


def loaded(medium: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The verb, with a `docker` that notes that it was called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "docker").write_text(f"#!/bin/sh\ntouch '{tmp_path}/docker-was-called'\nexit 1\n")
    (programs / "docker").chmod(0o755)
    return subprocess.run(
        [REPOSITORY / "scripts" / "load"],
        env={**os.environ, "FROM": str(medium), "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def flip(medium: Path) -> str:
    """One bit of the model."""
    data = bytearray((medium / "models.tar").read_bytes())
    data[3] ^= 1
    (medium / "models.tar").write_bytes(data)
    return "models.tar is missing or damaged"


def cut(medium: Path) -> str:
    """The end of the images."""
    os.truncate(medium / "images.tar", 5)
    return "images.tar is missing or damaged"


def lose(medium: Path) -> str:
    """A whole part."""
    (medium / "bundle.json").unlink()
    return "bundle.json is missing or damaged"


def cut_list(medium: Path) -> str:
    """The end of the list of checksums: what it names is whole."""
    lines = (medium / "SHA256SUMS").read_text().splitlines(keepends=True)
    (medium / "SHA256SUMS").write_text("".join(lines[:-1]))
    return "models.tar is missing or damaged"


def unfinished(medium: Path) -> str:
    """The list, which is written last."""
    (medium / "SHA256SUMS").unlink()
    return "holds no finished bundle"


@pytest.mark.parametrize("harm", [flip, cut, lose, cut_list, unfinished], ids=lambda harm: str(harm.__name__))
def test_a_medium_that_suffered_installs_nothing(medium: Path, tmp_path: Path, harm: Callable[[Path], str]) -> None:
    words = harm(medium)
    done = loaded(medium, tmp_path)
    assert done.returncode == 1
    assert words in done.stdout
    assert not (tmp_path / "docker-was-called").exists()


@pytest.fixture
def workshop(tmp_path: Path) -> Site:
    """A checkout with a model in its volume, where a bundle is made."""
    site = Site(tmp_path)
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *words], cwd=site.checkout, check=True)
    images = {name: {"image": f"appliance/{name}:dev"} for name in ("gateway", "vllm")}
    site.has("config.json", {"services": images})
    model(site.volume("models"), "of the volume")
    return site


def model(folder: Path, weights: str) -> None:
    """A model as the engine looks for it."""
    (folder / "some-model").mkdir(parents=True)
    (folder / "some-model" / "config.json").write_text("{}")
    (folder / "some-model" / "weights").write_text(weights)


@pytest.mark.parametrize(("given", "whose"), [("", "volume"), ("models", "volume"), ("./models", "folder")])
def test_the_model_is_taken_from_where_the_engine_has_it_and_goes_there(workshop: Site, given: str, whose: str) -> None:
    """`models` is a volume's name, as `.env.example` has it; a folder has a path."""
    model(workshop.checkout / "models", "of the folder")
    (workshop.checkout / ".env").write_text(f"MODEL_CACHE_DIR={given}\n")
    medium = workshop.docker / "medium"
    told = workshop.verb("bundle", TO=str(medium))
    assert told.endswith("status 0"), told
    with tarfile.open(medium / "models.tar") as carried:
        weights = carried.extractfile("models/some-model/weights")
        assert weights is not None
        assert weights.read().decode() == f"of the {whose}"
    places = {"volume": workshop.volume("models"), "folder": workshop.checkout / "models"}
    for folder in places.values():
        (folder / "some-model" / "weights").write_text("another")

    told = workshop.verb("load", FROM=str(medium))

    assert told.endswith("status 0"), told
    now = {name: (folder / "some-model" / "weights").read_text() for name, folder in places.items()}
    assert now == {"volume": "another", "folder": "another"} | {whose: f"of the {whose}"}


def test_images_bear_the_usual_project_whatever_the_bundlers_is(workshop: Site) -> None:
    """By that label the site's own verbs know them."""
    (workshop.docker / "volumes" / f"{PROJECT}_models").rename(workshop.docker / "volumes" / "mine_models")
    told = workshop.verb("bundle", TO=str(workshop.docker / "medium"), COMPOSE_PROJECT_NAME="mine")
    assert told.endswith("status 0"), told
    [build] = [call["words"] for call in workshop.calls() if "build" in call["words"]]
    assert build[build.index("--project-name") + 1] == PROJECT


def test_images_of_another_projects_label_are_known_by_what_ran_from_them(workshop: Site) -> None:
    """Bundled as `mine`, used here as the usual project, beside an image that was pulled."""
    pulled = container("nginx", "nginx:1.30")
    site = {"appliance/gateway:dev": "sha256:gateway", "nginx:1.30": "sha256:nginx", "other/app:1": "sha256:other"}
    workshop.has("containers.json", [container("gateway"), pulled])
    workshop.has("images.json", site)
    workshop.has("labels.json", {"sha256:gateway": "mine", "sha256:other": "mine"})
    told = workshop.verb("uninstall", YES="1")
    assert told.endswith("status 0"), told
    assert workshop.told("images.json") == {"nginx:1.30": "sha256:nginx", "other/app:1": "sha256:other"}


def test_a_backup_finds_a_gateway_image_of_another_projects_label(workshop: Site) -> None:
    """After `make down` there is no container to ask."""
    (workshop.volume("gateway-data") / "notes").write_text("something to back up")
    workshop.has("images.json", {"appliance/gateway:dev": "sha256:gateway"})
    told = workshop.verb("backup", TO=str(workshop.docker / "backup.tar"))
    assert told.endswith("status 0"), told


def test_a_bundle_without_a_model_is_none(workshop: Site) -> None:
    (workshop.volume("models") / "some-model" / "config.json").unlink()
    medium = workshop.docker / "medium"
    told = workshop.verb("bundle", TO=str(medium))
    assert f"error: no model was carried: {PROJECT}_models has no config.json" in told
    assert told.endswith("status 1")
    assert not (medium / "SHA256SUMS").exists()
