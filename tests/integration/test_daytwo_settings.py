"""Which appliance the day-two verbs mean: the one that `docker compose up` and `make up` mean, by `.env` as well."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = ("COMPOSE_PROJECT_NAME", "APPLIANCE_STATE", "MODE", "YES")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Another checkout of this product, as far as the verbs go, which may have a `.env` of its own."""
    folder = tmp_path / "checkout"
    for name in ("daytwo", "local"):
        shutil.copytree(REPOSITORY / "scripts" / name, folder / "scripts" / name)
    shutil.copy(REPOSITORY / "scripts" / "uninstall", folder / "scripts" / "uninstall")
    shutil.copy(REPOSITORY / "compose.yaml", folder)
    return folder


def ran(checkout: Path, *command: str, stdin: int = subprocess.DEVNULL, **settings: str) -> str:
    """What a command in the checkout says, and its status."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        command, cwd=checkout, env={**clean, **settings}, stdin=stdin, capture_output=True, text=True, timeout=120
    )
    return f"{done.stdout}{done.stderr}status {done.returncode}"


def meant(checkout: Path, **settings: str) -> list[str]:
    """Project and state folder."""
    script = "from scripts.daytwo.place import STATE, project_name as name; print(name(), STATE, end=' ')"
    return ran(checkout, "python3", "-c", script, **settings).split()[:2]


def test_the_project_and_the_state_are_those_of_the_dotenv_file(checkout: Path) -> None:
    assert meant(checkout) == ["appliance", str(checkout / ".state")]
    (checkout / ".env").write_text("COMPOSE_PROJECT_NAME='second' # not the first\nAPPLIANCE_STATE=kept\n")
    assert meant(checkout) == ["second", str(checkout / "kept")]
    assert meant(checkout, COMPOSE_PROJECT_NAME="third", APPLIANCE_STATE="") == ["third", str(checkout / ".state")]


def a_state(folder: Path) -> list[str]:
    """A stopped local appliance's state; what it holds."""
    (folder / "gateway-data").mkdir(parents=True)
    (folder / "backups").mkdir()
    (folder / "deployed.json").write_text('{"mode": "local"}')
    (folder / "models").symlink_to(folder.parent / "models-of-others")
    (folder.parent / "models-of-others").mkdir()
    (folder.parent / "models-of-others" / "weights").write_text("shared")
    return held(folder)


def held(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def answered(checkout: Path, answer: bytes) -> str:
    """What `make uninstall` says to an operator at a terminal who types `answer`."""
    operator, program = pty.openpty()
    try:
        os.write(operator, answer)
        return ran(checkout, "scripts/uninstall", stdin=program)
    finally:
        os.close(operator)
        os.close(program)


@pytest.mark.parametrize("answer", [b"no\n", b"\n", b"yes\n", b"\x04"], ids=["no", "nothing", "yes", "end"])
def test_uninstall_asks_and_only_the_word_removes(checkout: Path, answer: bytes) -> None:
    before = a_state(checkout / ".state")
    told = answered(checkout, answer)
    assert "Type `remove`" in told
    assert told.endswith("uninstall: nothing was removed\nstatus 1"), told
    assert held(checkout / ".state") == before


def test_uninstall_without_a_terminal_wants_to_be_told(checkout: Path) -> None:
    before = a_state(checkout / ".state")
    told = ran(checkout, "scripts/uninstall")
    assert "YES=1" in told
    assert told.endswith("status 1")
    assert held(checkout / ".state") == before


def test_uninstall_keeps_backups_and_what_only_links_lead_to(checkout: Path) -> None:
    a_state(checkout / ".state")
    told = answered(checkout, b"remove\n")
    assert told.endswith("status 0"), told
    assert held(checkout / ".state") == ["backups"]
    assert held(checkout / "models-of-others") == ["weights"]


def test_uninstall_stops_what_only_watches(checkout: Path) -> None:
    """`make monitoring` alone has a supervisor too, and no ledger open."""
    a_state(checkout / ".state")
    (checkout / ".state" / "run").mkdir()
    (checkout / ".state" / "run" / "monitoring.json").write_text("{}")
    down = checkout / "scripts" / "down"
    down.write_text('#!/bin/sh\nls .state/run > "$(dirname "$0")/../stopped"\n')
    down.chmod(0o755)
    told = ran(checkout, "scripts/uninstall", YES="1")
    assert told.endswith("status 0"), told
    assert (checkout / "stopped").read_text() == "monitoring.json\n", "it is stopped while its file is still there"


@pytest.mark.parametrize("named", [".", ".."])
def test_uninstall_never_removes_the_checkout(checkout: Path, named: str) -> None:
    (checkout / "gateway-data").mkdir()
    (checkout.parent / "gateway-data").mkdir()
    told = ran(checkout, "scripts/uninstall", YES="1", MODE="local", APPLIANCE_STATE=named)
    assert "holds this checkout" in told
    assert told.endswith("status 1")
    assert (checkout / "compose.yaml").exists()
