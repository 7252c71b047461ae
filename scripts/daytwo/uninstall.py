"""`make uninstall`: containers, networks, volumes, built images and state; backups stay."""

import os
import shutil
import subprocess
import sys

from scripts.daytwo.place import STATE, ComposePlace, LocalPlace, PlaceError, find, run, told
from scripts.daytwo.settings import REPOSITORY
from scripts.daytwo.upgrade import UPGRADES, forget

PROJECT = "com.docker.compose.project"


def remove_project(place: ComposePlace) -> None:
    """Everything that bears the project's label, what it ran from, and nothing that another project uses."""
    ran = {str(one["Image"]) for one in place.containers()}
    label = f"label={PROJECT}={place.project}"
    # Whatever runs from an image of ours has the image's labels: only Compose's own containers have this one.
    containers = run("docker", "ps", "-aq", "--filter", label, "--filter", "label=com.docker.compose.oneoff").split()
    if containers:
        run("docker", "rm", "--force", "--volumes", *containers)
    for kind in ("network", "volume"):
        found = run("docker", kind, "ls", "-q", "--filter", label).split()
        if found:
            run("docker", kind, "rm", *found)
    images = set(run("docker", "image", "ls", "-q", "--no-trunc", "--filter", label).split())
    # A bundle's images bear another project's label, those that were pulled bear none and stay.
    images |= ran & set(run("docker", "image", "ls", "-q", "--no-trunc", "--filter", f"label={PROJECT}").split())
    used = {image for image in images if run("docker", "ps", "-aq", "--filter", f"ancestor={image}").strip()}
    if images - used:
        run("docker", "image", "rm", "--force", *sorted(images - used))
    if used:
        print(f"uninstall: images that stay, because other containers use them: {len(used)}", flush=True)


def confirmed(what: str) -> bool:
    """Whether the operator agrees: YES=1, or the word typed."""
    if os.environ.get("YES") == "1":
        return True
    if not sys.stdin.isatty():
        raise PlaceError(f"this removes {what}; say YES=1 to do it without being asked")
    try:
        return input(f"This removes {what}. Type `remove` to go on: ").strip() == "remove"
    except (EOFError, KeyboardInterrupt):
        print()
        return False


def main() -> int:
    """Removes the appliance of this checkout."""
    place = find()
    if REPOSITORY.resolve().is_relative_to(STATE.resolve()):
        raise PlaceError(f"APPLIANCE_STATE={STATE} holds this checkout, and all in it would be removed")
    what = f"project {place.project}" if isinstance(place, ComposePlace) else f"the local appliance in {STATE}"
    if not confirmed(f"{what} with keys, ledger, secrets and models"):
        print("uninstall: nothing was removed")
        return 1
    if isinstance(place, ComposePlace):
        remove_project(place)
        for folder in UPGRADES.glob("*"):
            try:
                forget(folder)
            except PlaceError as problem:  # somebody's container has the image
                print(f"uninstall: {problem}", flush=True)
    else:
        assert isinstance(place, LocalPlace)
        place.stop()
    if (REPOSITORY / "scripts" / "standin" / "engine").exists() and (STATE / "docker").is_dir():
        subprocess.run([REPOSITORY / "scripts" / "docker-standin", "stop"], check=True)
    for entry in list(STATE.iterdir()) if STATE.is_dir() else []:
        if entry.name != "backups":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    kept = STATE / "backups"
    print(f"uninstall: {what} is gone" + (f"; backups stay in {kept}" if kept.is_dir() else ""))
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
