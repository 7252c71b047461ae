"""`make upgrade` and its way back, from Docker's side: whose files are used, what is kept."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from scripts.local import mounted
from tests.doubles.daytwo_site import REPOSITORY, Site, container

BEFORE = "20260101T000000Z"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An appliance that was upgraded once."""
    site = Site(tmp_path)
    (site.volume("gateway-data") / "notes").write_text("something to back up")
    site.has("containers.json", [container("gateway"), container("vllm")])
    site.has("images.json", {})
    upgraded(site, BEFORE)
    return site


def upgraded(site: Site, stamp: str) -> None:
    """What one upgrade leaves: the files of the version before, and names for its images."""
    folder = site.state / "upgrades" / stamp
    (folder / "tree").mkdir(parents=True)
    names = {
        f"appliance/{service}:dev": f"appliance-before/{service}:{stamp.lower()}" for service in ("gateway", "vllm")
    }
    facts = {"commit": "v1", "files": ["compose.yaml"], "images": names, "services": ["gateway", "vllm"], "forms": {}}
    (folder / "before.json").write_text(json.dumps(facts))
    known = site.told("images.json")
    site.has("images.json", known | dict.fromkeys(names.values(), f"sha256:{stamp}"))


@pytest.mark.parametrize(
    ("given", "certificates", "models"),
    [
        ("", "certificates", None),
        ("CERTIFICATES_DIR=./mine\nMODEL_CACHE_DIR=../models\n", "mine", "../models"),
        ("CERTIFICATES_DIR=\nMODEL_CACHE_DIR=models\n", "certificates", "models"),
        ("MODEL_CACHE_DIR=~/models\n", "certificates", "~/models"),
    ],
)
def test_the_way_back_leaves_the_operator_what_lies_beside_the_files(
    site: Site, given: str, certificates: str, models: str | None
) -> None:
    """The old version's files are unpacked elsewhere: from there `./certificates` would be empty, and `./models` too."""
    (site.checkout / ".env").write_text(given)
    told = site.verb("upgrade", BACK="1", HOME="/home/somebody")
    assert told.endswith("upgrade: back at v1\nstatus 0"), told
    [up] = [call for call in site.calls() if "up" in call["words"]]
    assert up["words"][up["words"].index("--project-directory") + 1] == str(site.state / "upgrades" / BEFORE / "tree")
    assert up["CERTIFICATES_DIR"] == str(site.checkout / certificates)
    folders = {"../models": str(site.checkout.parent / "models"), "~/models": "/home/somebody/models"}
    assert up.get("MODEL_CACHE_DIR") == folders.get(str(models)), "a volume stays one"


def released(site: Site) -> None:
    """The checkout is a version that can be upgraded to, with the one before as `v1`."""
    commit = ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first"]
    (site.checkout / ".gitignore").write_text(".state/\n__pycache__/\n")
    for words in (["init", "-q"], ["add", "."], commit, ["tag", "v1"]):
        subprocess.run(["git", *words], cwd=site.checkout, check=True)


def stamps(site: Site) -> tuple[set[str], set[str]]:
    """The upgrades that have a folder, and those that have names of images."""
    folders = {path.name for path in (site.state / "upgrades").iterdir()}
    return folders, {name.partition(":")[2].upper() for name in site.told("images.json") if "-before/" in name}


def test_the_last_two_upgrades_are_kept(site: Site) -> None:
    others = ["20260201T000000Z", "20260301T000000Z"]
    for stamp in others:
        upgraded(site, stamp)
    released(site)
    told = site.verb("upgrade", PREVIOUS="v1")
    assert "the way back is `make upgrade BACK=1`" in told
    assert told.endswith("status 0"), told
    folders, images = stamps(site)
    assert folders == images
    assert len(folders) == 2
    assert "20260301T000000Z" in folders
    assert not folders & {BEFORE, "20260201T000000Z"}


def test_what_still_runs_from_an_old_upgrade_stays(site: Site) -> None:
    for stamp in ("20260201T000000Z", "20260301T000000Z"):
        upgraded(site, stamp)
    released(site)
    uses = (str(site.state / "upgrades" / BEFORE / "tree" / "nginx"),)
    site.has("containers.json", [container("gateway"), container("vllm", mounts=uses)])
    site.has("fail", "image rm appliance-before/gateway:20260201t000000z")
    told = site.verb("upgrade", PREVIOUS="v1")
    assert told.endswith("status 0"), told
    assert "20260201T000000Z stays: `docker image rm" in told
    folders, images = stamps(site)
    assert folders == images
    assert {BEFORE, "20260201T000000Z", "20260301T000000Z"} < folders


def test_uninstall_leaves_no_names_of_images(site: Site) -> None:
    told = site.verb("uninstall", YES="1")
    assert told.endswith("status 0"), told
    assert site.told("images.json") == {}
    assert not (site.state / "upgrades").exists()


def test_changed_rules_and_configurations_are_taken_up(site: Site) -> None:
    """Compose compares definitions, not the files in mounted folders."""
    for name in ("prometheus", "loki"):
        shutil.copytree(REPOSITORY / name, site.checkout / name)
    site.has("containers.json", [container(name) for name in ("gateway", "vllm", "prometheus", "loki")])
    read = mounted.digests(site.checkout)
    (site.state / "mounted.json").write_text(json.dumps(read))
    rules = site.checkout / "prometheus" / "rules" / "gpu.yml"
    rules.write_text(rules.read_text() + "\n")
    released(site)
    told = site.verb("upgrade", PREVIOUS="v1")
    assert told.endswith("status 0"), told
    ups = [call["words"] for call in site.calls() if "up" in call["words"]]
    assert [words[words.index("--force-recreate") + 1 :] for words in ups if "--force-recreate" in words] == [
        ["prometheus"]
    ]
    assert json.loads((site.state / "mounted.json").read_text())["prometheus"] != read["prometheus"]
