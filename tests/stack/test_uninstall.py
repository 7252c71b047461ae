"""`make uninstall` of a second appliance beside the first: nothing of it stays, and nothing of the first is touched."""

import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.stack.appliance import NOTES, REPOSITORY, STANDIN, Appliance
from tests.stack.load import Load
from tests.stack.proof import ledger_difference
from tests.stack.waiting import until

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long]
LISTS = {
    "container": ("ps", "--all", "--quiet", "--no-trunc"),
    "network": ("network", "ls", "--quiet", "--no-trunc"),
    "volume": ("volume", "ls", "--quiet"),
    "image": ("image", "ls", "--quiet", "--no-trunc"),
}


@pytest.fixture
def second(appliance: Appliance) -> Iterator[Appliance]:
    """Another whole appliance on the same Docker Engine, from images of its own; its engine need not be ready."""
    one = Appliance(left_out=appliance.left_out, settings={"APPLIANCE_PREFIX": "appliance-second"})
    try:
        one.build()
        one.compose("up", "--detach", "--no-build", *one.services(), seconds=1200)
        yield one
    finally:
        one.down()
        if images := one.docker("image", "ls", "--quiet", "--filter", "reference=appliance-second/*").split():
            one.docker("image", "rm", "--force", *set(images))


def listed(appliance: Appliance, kind: str) -> set[str]:
    """What Docker has of a kind that is the appliance's; a container that only runs one of its images is not."""
    label = f"label=com.docker.compose.project={appliance.project}"
    made = ("--filter", "label=com.docker.compose.oneoff") if kind == "container" else ()
    return set(appliance.docker(*LISTS[kind], "--filter", label, *made).split())


def nameless(appliance: Appliance, containers: set[str]) -> set[str]:
    """The volumes that containers have because their images say so; only the containers know whose they are."""
    mounts = [mount for one in json.loads(appliance.docker("inspect", *containers)) for mount in one["Mounts"]]
    return {mount["Name"] for mount in mounts if mount["Type"] == "volume"}


def everything(appliance: Appliance) -> dict[str, set[str]]:
    """All that this Docker Engine has, of whomever it is; for containers also when they began to run."""
    found = {kind: set(appliance.docker(*words).split()) for kind, words in LISTS.items()}
    described = json.loads(appliance.docker("inspect", *found["container"]))
    found["start"] = {f"{one['Id']} {one['State']['StartedAt']}" for one in described}
    return found


def uninstall(appliance: Appliance, state: Path, answer: str | None = None) -> str:
    """The verb as an operator at a terminal who types `answer`, or as a program without one; its output and status."""
    started = time.monotonic()
    operator, terminal = pty.openpty()
    try:
        if answer is not None:
            os.write(operator, answer.encode())
        done = subprocess.run(
            [STANDIN, "exec", REPOSITORY / "scripts" / "uninstall"],
            env={**os.environ, **appliance.settings, "MODE": "cpu", "APPLIANCE_STATE": str(state)},
            stdin=subprocess.DEVNULL if answer is None else terminal,
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        os.close(operator)
        os.close(terminal)
    if done.returncode == 0:
        NOTES.append(f"stack: make uninstall took {time.monotonic() - started:.0f} s")
    return f"{done.stdout}{done.stderr}status {done.returncode}"


def test_uninstall_removes_one_appliance_and_touches_no_other(
    appliance: Appliance, second: Appliance, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    for name in ("backups", "upgrades"):
        (state / name).mkdir(parents=True)
    (state / "deployed.json").write_text('{"mode": "cpu"}')
    # A program of somebody else runs from one of its images, and has the image's labels.
    borrowed = str(second.inspect("gateway")["Image"])
    words = ("run", "--detach", "--network", "none", "--entrypoint", "sleep", borrowed, "3600")
    borrower = appliance.docker(*words).strip()
    try:
        removes_it_alone(appliance, second, state, borrowed)
    finally:
        appliance.docker("rm", "--force", borrower)


def removes_it_alone(appliance: Appliance, second: Appliance, state: Path, borrowed: str) -> None:
    """The questions, the noes, the word, and what is there afterwards."""
    before = everything(appliance)
    own = {kind: listed(second, kind) for kind in LISTS}
    assert all(own.values()), own
    own["volume"] |= nameless(second, own["container"])
    assert borrowed in own["image"]
    place = f"from scripts.daytwo.place import ComposePlace as P; print(*(c['Id'] for c in P('{second.project}').containers()))"
    assert set(second.run("python3", "-c", place).split()) == own["container"], "a verb would take others for its own"
    held = sorted(path.name for path in state.iterdir())
    for answer, words in ((None, "YES=1"), ("no\n", "nothing was removed"), ("\x04", "nothing was removed")):
        told = uninstall(second, state, answer)
        assert words in told, told
        assert told.endswith("status 1"), told
        assert everything(appliance) == before
        assert sorted(path.name for path in state.iterdir()) == held

    with Load(appliance.edge, callers=2) as load:
        until("load is answered", lambda: len(load.whole_since(0)) >= 3, 120)
        told = uninstall(second, state, "remove\n")
        gone = time.monotonic()
        until("load is still answered", lambda: len(load.whole_since(gone)) >= 3, 120)
    assert told.endswith("status 0"), told
    assert "because other containers use them: 1" in told, told

    left = {kind: listed(second, kind) for kind in LISTS}
    assert left == {"container": set(), "network": set(), "volume": set(), "image": {borrowed}}
    assert [path.name for path in state.iterdir()] == ["backups"]
    after = everything(appliance)
    for kind in LISTS:
        assert after[kind] == before[kind] - (own[kind] - {borrowed}), kind
    assert after["start"] == {one for one in before["start"] if one.split()[0] not in own["container"]}
    assert all(call.whole for call in load.calls), [call.answer for call in load.calls if not call.whole]
    assert ledger_difference(appliance, load.calls) == 0
