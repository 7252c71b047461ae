"""`make upgrade`: move the running appliance to this checkout, with a way back; `BACK=1` takes it.

Before anything changes there is a backup, the images that run get names of their own, and the files of the version
that runs are laid beside. If the new version does not become healthy, the way back is taken at once.
"""

import datetime as dt
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from scripts.daytwo import archive
from scripts.daytwo.backup import backup, put_back, summary, version
from scripts.daytwo.place import (
    STATE,
    ComposePlace,
    LocalPlace,
    PlaceError,
    find,
    healthy,
    last_started,
    restarts,
    run,
    service_of,
    told,
)
from scripts.daytwo.settings import REPOSITORY, models_folder, own_certificate, setting
from scripts.local import mounted
from scripts.local.places import Places

DEPLOYED = STATE / "deployed.json"
UPGRADES = STATE / "upgrades"
SCHEMA_FOLDER = "gateway-data"
KEPT_UPGRADES = 2


def deployed(place: ComposePlace) -> tuple[str, list[str]]:
    """The version that runs, and the Compose files it was started from."""
    known = last_started()
    commit = os.environ.get("PREVIOUS") or str(known.get("commit") or "")
    if not commit:
        raise PlaceError("which version runs? Say PREVIOUS=<tag or commit>; the way back needs its files")
    files = known.get("files") or setting("COMPOSE_FILE").split(":")
    if files == [""]:  # started by hand: its containers say from what
        labels = [one["Config"]["Labels"] for one in place.containers()]  # type: ignore[index]
        told = next((one["com.docker.compose.project.config_files"] for one in labels), "compose.yaml")
        files = [Path(path).name for path in told.split(",")]
    assert isinstance(files, list)
    return commit.removesuffix("-dirty"), files


def compose(place: ComposePlace, tree: Path, files: list[str], *words: str) -> None:
    """Docker Compose with one version's files on the project.

    What the operator has beside them stays in this checkout, whichever version's files are used.
    """
    beside = {"CERTIFICATES_DIR": own_certificate(), "MODEL_CACHE_DIR": models_folder()}
    environment = os.environ | {name: os.path.abspath(folder) for name, folder in beside.items() if folder}
    named = [word for name in files for word in ("-f", str(tree / name))]
    settings = ["--env-file", str(REPOSITORY / ".env")] if (REPOSITORY / ".env").is_file() else []
    project = ("docker", "compose", "-p", place.project, "--project-directory", tree, *settings, *named)
    run(*project, *words, quiet=False, env=environment)


def remember(place: ComposePlace, folder: Path, commit: str, files: list[str]) -> None:
    """Everything the way back needs: a backup, the old files, the old images, what ran."""
    folder.mkdir(parents=True)
    manifest = backup(place, folder / "backup.tar")
    print(f"upgrade: backed up {summary(manifest)}", flush=True)
    tree = folder / "tree"
    tree.mkdir()
    run("git", "-C", REPOSITORY, "archive", "--format=tar", f"--output={folder / 'tree.tar'}", commit)
    run("tar", "-xf", folder / "tree.tar", "-C", tree)
    (folder / "tree.tar").unlink()
    for name in files:
        if not (tree / name).exists():  # one of the operator's own, such as compose.override.yaml
            shutil.copy(REPOSITORY / name, tree / name)
    images = {}
    for one in place.containers():
        name = kept_name(service_of(one), folder)
        run("docker", "image", "tag", str(one["Image"]), name)
        images[str(one["Config"]["Image"])] = name  # type: ignore[index]
    services = [service_of(one) for one in place.containers()]
    facts = {"commit": commit, "files": files, "images": images, "services": services, "forms": manifest.forms}
    (folder / "before.json").write_text(json.dumps(facts, indent=1))


def kept_name(service: str, folder: Path) -> str:
    """What the image that a service ran from is called in the way back of an upgrade."""
    return f"appliance-before/{service}:{folder.name.lower()}"


def forget(folder: Path) -> None:
    """Removes the way back of an upgrade: the names of its images, and with its last name an image, and its folder."""
    names = f"reference={kept_name('*', folder)}"
    images = run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "--filter", names).split()
    if images:
        run("docker", "image", "rm", *images)
    shutil.rmtree(folder)


def forget_old(place: ComposePlace) -> None:
    """Keeps the last upgrades; of those before, only what containers still use. Nobody else would ever remove them."""
    mounts = [mount for one in place.containers() for mount in one.get("Mounts", [])]  # type: ignore[attr-defined]
    for folder in sorted(path for path in UPGRADES.glob("*") if path.is_dir())[:-KEPT_UPGRADES]:
        if any(Path(str(mount.get("Source", ""))).is_relative_to(folder) for mount in mounts):
            continue  # what runs is the version from before, on these files
        try:
            forget(folder)
        except (PlaceError, OSError) as problem:
            print(f"upgrade: {folder} stays: {problem}", flush=True)


def forward(place: ComposePlace, files: list[str], services: list[str]) -> None:
    """Builds this checkout and replaces what runs by it. Raises `PlaceError` when it does not become healthy."""
    compose(place, REPOSITORY, files, "build", "--quiet", *services)
    up = ("up", "--detach", "--no-build")
    read_now = {name: digest for name, digest in mounted.digests(REPOSITORY).items() if name in services}
    # Compose sees no change in a folder that it mounts: rules and configurations of before would go on.
    outdated = sorted(mounted.stale(Places(STATE), read_now) & set(place.running()))
    if outdated:
        compose(place, REPOSITORY, files, *up, "--no-deps", "--force-recreate", *outdated)
    compose(place, REPOSITORY, files, *up, *services)
    mounted.note(Places(STATE), read_now)
    verify(place)


def verify(place: ComposePlace) -> None:
    """Every lasting service is healthy and the gateway reads its ledger."""
    place.await_healthy(sorted(service_of(one) for one in place.containers() if restarts(one)))
    ill = [service_of(one) for one in place.containers() if restarts(one) and not healthy(one["State"])]
    if ill:
        raise PlaceError(f"{', '.join(ill)} is not healthy")


def back(place: ComposePlace, folder: Path) -> None:
    """The version from before: its images, its files; its data only where the new version changed their form."""
    before = json.loads((folder / "before.json").read_text())
    for name, kept in before["images"].items():
        run("docker", "image", "tag", kept, name)
    present = folder / "at-return.tar"
    manifest = backup(place, present)
    if ledger_form(manifest.forms) != ledger_form(before["forms"]):
        print(
            f"upgrade: the ledger's form had changed: the copy from before is put back; newer data: {present}",
            flush=True,
        )
        place.stop()
        with tempfile.TemporaryDirectory() as scratch:
            _, packed = archive.read(folder / "backup.tar", Path(scratch))
            put_back(place, packed)
    # Only what differs is made anew: an engine that is the same in both versions goes on serving.
    words = ("up", "--detach", "--no-build", "--remove-orphans", *before["services"])
    compose(place, folder / "tree", before["files"], *words)
    verify(place)
    record(before["commit"], before["files"])


def ledger_form(forms: dict[str, str]) -> dict[str, str]:
    """The gateway's databases among all that a backup holds."""
    return {name: form for name, form in forms.items() if name.startswith(SCHEMA_FOLDER)}


def record(commit: str, files: list[str]) -> None:
    """Notes what runs now."""
    DEPLOYED.parent.mkdir(parents=True, exist_ok=True)
    DEPLOYED.write_text(json.dumps({**last_started(), "commit": commit, "files": files}) + "\n")


def upgrade_local(place: LocalPlace) -> None:
    """Processes of this machine: backup, stop, new environment, start."""
    target = STATE / "backups" / f"before-upgrade-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}.tar"
    print(f"upgrade: backed up {summary(backup(place, target))} to {target}", flush=True)
    place.stop()
    run("make", "-C", REPOSITORY, "setup", quiet=False)
    try:
        place.start()
    except PlaceError as problem:
        way = f"git checkout <version before>; make setup; make restore FROM={target}; make up"
        raise PlaceError(f"{problem}. The way back: {way}") from None


def main() -> int:
    """Upgrades, or with BACK=1 returns from the last upgrade."""
    place = find()
    if isinstance(place, LocalPlace):
        upgrade_local(place)
        return 0
    assert isinstance(place, ComposePlace)
    if os.environ.get("BACK") == "1":
        done = sorted(path for path in UPGRADES.glob("*") if (path / "before.json").exists())
        if not done:
            raise PlaceError("there is no upgrade to return from")
        back(place, done[-1])
        print(f"upgrade: back at {json.loads((done[-1] / 'before.json').read_text())['commit']}")
        shutil.move(done[-1] / "before.json", done[-1] / "returned.json")
        return 0
    commit, files = deployed(place)
    services = sorted({service_of(one) for one in place.containers()})
    folder = UPGRADES / f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}"
    remember(place, folder, commit, files)
    try:
        forward(place, files, services)
    except PlaceError as problem:
        print(f"upgrade: {problem}; going back", flush=True)
        back(place, folder)
        raise PlaceError(f"{version()} did not become healthy; {commit} serves again") from None
    record(version(), files)
    forget_old(place)
    print(f"upgrade: {version()} serves; the way back is `make upgrade BACK=1` ({folder})")
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
