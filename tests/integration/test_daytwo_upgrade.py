"""`make upgrade` and its way back, from Docker's side: whose files are used, what is kept."""

import json
from pathlib import Path

import pytest
from tests.doubles.daytwo_site import Site, container

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
