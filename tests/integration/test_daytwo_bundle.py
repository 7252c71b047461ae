"""`make load` of a medium that suffered on its way: told before anything is installed, whatever suffered."""

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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
