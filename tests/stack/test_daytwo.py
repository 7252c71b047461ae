"""The day-two verbs on the running stack. They take minutes, because the engine starts again: `make test-long`."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from tests.stack.appliance import NOTES, REPOSITORY, STANDIN, Appliance
from tests.stack.edge import Edge
from tests.stack.load import Load
from tests.stack.proof import ledger_difference
from tests.stack.waiting import until

pytestmark = [pytest.mark.timeout(3600), pytest.mark.long]


def make(appliance: Appliance, verb: str, state: Path, repository: Path = REPOSITORY, **settings: str) -> str:
    """A verb as `make` runs it, on this appliance, with a state folder of its own; its output, whatever its status."""
    started = time.monotonic()
    done = subprocess.run(
        [STANDIN, "exec", repository / "scripts" / verb],
        env={**os.environ, **appliance.settings, "MODE": "cpu", "APPLIANCE_STATE": str(state), **settings},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    back = " BACK=1" if settings.get("BACK") else ""
    NOTES.append(f"stack: make {verb}{back} took {time.monotonic() - started:.0f} s")
    return f"{done.stdout}{done.stderr}status {done.returncode}"


def known(appliance: Appliance, secret: object) -> int:
    """The status that a key gets."""
    return Edge("127.0.0.1", appliance.edge.port, str(secret)).call("GET", "/v1/models").status


def findings(appliance: Appliance, state: Path) -> dict[str, list[dict[str, str]]]:
    """What `make doctor` finds, by area."""
    told = appliance.run("env", f"APPLIANCE_STATE={state}", "MODE=cpu", "scripts/doctor", "--json", check=False)
    found: dict[str, list[dict[str, str]]] = {}
    for line in told.splitlines():
        one = json.loads(line)
        found.setdefault(one["area"], []).append(one)
    return found


def test_doctor_knows_a_sound_appliance_from_an_ill_one(appliance: Appliance, tmp_path: Path) -> None:
    def own() -> bool:
        return [one["verdict"] for one in findings(appliance, tmp_path).get("certificate", [])] == ["ok"]

    # One that ends tomorrow may still be served, of a test before: the keeper goes back to the appliance's own.
    until("the appliance's own certificate is served", own, 90, every=2)
    sound = findings(appliance, tmp_path)
    for area in ("docker", "ports", "services", "service", "certificate", "ledger"):
        assert {one["verdict"] for one in sound[area]} == {"ok"}, sound[area]
    appliance.docker("pause", appliance.container("gpu-exporter"))
    try:
        ill = findings(appliance, tmp_path)["services"]
    finally:
        appliance.docker("unpause", appliance.container("gpu-exporter"))
    assert [one["what"].partition(",")[0] for one in ill if one["verdict"] == "wrong"] == ["gpu-exporter: paused"]


def test_backup_under_load_and_restore(appliance: Appliance, tmp_path: Path) -> None:
    before = appliance.create_key("before-backup")
    target = tmp_path / "backup.tar"
    with Load(appliance.edge) as load:
        until("load is answered", lambda: len(load.whole_since(0)) >= 3, 60)
        told = make(appliance, "backup", tmp_path, TO=str(target))
        assert told.endswith("status 0"), told
    assert ledger_difference(appliance, load.calls) == 0
    broken = [call for call in load.calls if not call.whole]
    assert not broken, f"{len(broken)} of {len(load.calls)} calls suffered from the backup: {broken[0]}"
    NOTES.append(f"stack: {len(load.calls)} calls ran during the backup, all answered whole")
    after = appliance.create_key("after-backup")
    assert (known(appliance, before["secret"]), known(appliance, after["secret"])) == (200, 200)

    told = make(appliance, "restore", tmp_path, FROM=str(target))

    assert told.endswith("status 0"), told
    until("a call would be admitted", appliance.edge.ready, 900, every=0.5)
    assert (known(appliance, before["secret"]), known(appliance, after["secret"])) == (200, 401)
    assert appliance.edge.chat().text.find("Paris") > 0


def test_rotated_secrets_are_in_use_and_the_old_ones_are_not(appliance: Appliance, tmp_path: Path) -> None:
    read = "from pathlib import Path\nfor p in sorted(Path('/run/secrets').iterdir()): print(p.name, p.read_text())"
    old = appliance.exec("gateway", "python3", "-c", read)
    admin = dict(line.split(" ") for line in old.split("\n") if line)["gateway_admin_key"]

    told = make(appliance, "rotate-secrets", tmp_path)

    assert told.endswith("status 0"), told
    until("a call would be admitted", appliance.edge.ready, 900, every=0.5)
    new = appliance.exec("gateway", "python3", "-c", read)
    assert {line.split(" ")[0] for line in new.split("\n")} == {line.split(" ")[0] for line in old.split("\n")}
    assert not set(old.split("\n")) & set(new.split("\n")) - {""}
    ask = f"import urllib.request as u\nr = u.Request('http://127.0.0.1:8080/admin/keys', headers={{'Authorization': 'Bearer {admin}'}})\ntry: print(u.urlopen(r).status)\nexcept u.HTTPError as e: print(e.code)"
    assert (
        appliance.exec(
            "gateway", "python3", "-c", ask.replace("u.HTTPError", "__import__('urllib.error').error.HTTPError")
        ).strip()
        == "401"
    )
    assert appliance.edge.chat().status == 200
    for secret in (line.split(" ")[1] for line in (old + new).split("\n") if line):
        assert secret not in appliance.logs()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A clone of this checkout as committed; tests commit the next version there."""
    folder = tmp_path / "release"
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    for name, value in (("user.name", "test"), ("user.email", "test@example.org")):
        subprocess.run(["git", "-C", str(folder), "config", name, value], check=True)
    return folder


def commit(folder: Path, message: str) -> None:
    """The next version."""
    subprocess.run(["git", "-C", str(folder), "commit", "--quiet", "--all", "--message", message], check=True)


def running_gateway(appliance: Appliance) -> str:
    """What the gateway's image says of its version."""
    return appliance.exec(
        "gateway", "python3", "-c", "import gateway; print(getattr(gateway, 'RELEASE', 'old'))"
    ).strip()


def test_upgrade_and_back_with_data(appliance: Appliance, release: Path, tmp_path: Path) -> None:
    files = {"commit": "HEAD~1", "files": ["compose.yaml", "compose.cpu.yaml"]}
    state = tmp_path / "state"
    state.mkdir()
    (state / "deployed.json").write_text(json.dumps(files))
    init = release / "services/gateway/src/gateway/__init__.py"
    init.write_text(init.read_text() + '\nRELEASE = "new"\n')
    commit(release, "The next release")
    key = appliance.create_key("from-before")

    told = make(appliance, "upgrade", state, release)
    assert told.endswith("status 0"), told
    assert running_gateway(appliance) == "new"
    until("a call would be admitted", appliance.edge.ready, 900, every=0.5)
    assert known(appliance, key["secret"]) == 200
    during = appliance.create_key("from-between")

    told = make(appliance, "upgrade", state, release, BACK="1")
    assert told.endswith("status 0"), told
    assert running_gateway(appliance) == "old"
    until("a call would be admitted", appliance.edge.ready, 900, every=0.5)
    assert (known(appliance, key["secret"]), known(appliance, during["secret"])) == (200, 200)


def test_a_release_that_does_not_start_is_taken_back(appliance: Appliance, release: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "deployed.json").write_text(
        json.dumps({"commit": "HEAD~1", "files": ["compose.yaml", "compose.cpu.yaml"]})
    )
    main = release / "services/gateway/src/gateway/__main__.py"
    main.write_text('raise SystemExit("broken release")\n')
    commit(release, "A broken release")

    told = make(appliance, "upgrade", state, release)

    assert told.endswith("status 1"), told
    assert "serves again" in told
    until("a call would be admitted", appliance.edge.ready, 900, every=0.5)
    assert appliance.edge.chat().status == 200
