"""`make bundle` and `make load`: the appliance on a medium, for a site without a network.

A bundle is a folder: `images.tar`, `models.tar`, `appliance.tar` (this checkout as committed), `bundle.json`, and
`SHA256SUMS`, which `sha256sum -c` checks without any of our programs.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from scripts.daytwo import archive
from scripts.daytwo.backup import version
from scripts.daytwo.place import ComposePlace, PlaceError, project_name, run, told, usual_name
from scripts.daytwo.settings import REPOSITORY, models_folder, setting

SUMS = "SHA256SUMS"
PARTS = ("appliance.tar", "bundle.json", "images.tar", "models.tar")
FILES = {"gpu": ["compose.yaml"], "cpu": ["compose.yaml", "compose.cpu.yaml"]}


def compose(mode: str, *words: str, quiet: bool = True) -> str:
    """Docker Compose on this checkout's files for the mode."""
    files = [word for name in FILES[mode] for word in ("-f", str(REPOSITORY / name))]
    return run("docker", "compose", *files, *words, quiet=quiet, cwd=REPOSITORY)


def chosen_mode() -> str:
    """MODE, or what this machine would run."""
    mode = setting("MODE") or ("gpu" if shutil.which("nvidia-smi") else "cpu")
    if mode not in FILES:
        raise PlaceError(f"MODE={mode}: a bundle is made for gpu or cpu")
    return mode


def services_and_images(mode: str) -> tuple[list[str], list[str]]:
    """The services to carry (SERVICES names some, with what they need; default all) and their images."""
    described = json.loads(compose(mode, "config", "--format", "json"))["services"]
    asked = os.environ.get("SERVICES", "").split() or list(described)
    services: list[str] = []
    while asked:
        name = asked.pop()
        if name not in described:
            raise PlaceError(f"SERVICES names {name}, which compose.yaml does not have")
        if name not in services:
            services.append(name)
            asked += list(described[name].get("depends_on", {}))
    if "gateway" not in services:
        raise PlaceError("SERVICES must have gateway: its image installs the bundle")
    return sorted(services), sorted({described[name]["image"] for name in services})


def gateway_image(images: list[str]) -> str:
    """The gateway's among the images of a bundle."""
    return next(image for image in images if image.partition(":")[0].endswith("/gateway"))


def models_place(images: list[str]) -> ComposePlace:
    """The appliance with its models: a volume, or the folder that MODEL_CACHE_DIR names."""
    own = models_folder()
    folders = {"models": str(own.resolve())} if own else {}
    return ComposePlace(project_name(), image=gateway_image(images), folders=folders)


def make_images(mode: str, services: list[str], images: list[str]) -> None:
    """Builds what is built and pulls what is missing. Raises `PlaceError` naming what cannot be had."""
    # Compose labels what it builds with the project; on the site that is rarely this machine's.
    compose(mode, "--project-name", usual_name(), "build", "--quiet", *services, quiet=False)
    missing = []
    for image in images:
        known = subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0
        if not known and subprocess.run(["docker", "pull", "--quiet", image], stdout=subprocess.DEVNULL).returncode:
            missing.append(image)
    if missing:
        raise PlaceError(f"cannot be had: {', '.join(missing)}; SERVICES='nginx gateway …' bundles some services only")


def bundle(target: Path) -> None:
    """Writes the bundle; the checksums last, so that an unfinished one never passes as whole."""
    mode = chosen_mode()
    services, images = services_and_images(mode)
    target.mkdir(parents=True, exist_ok=True)
    (target / SUMS).unlink(missing_ok=True)
    make_images(mode, services, images)
    print(f"bundle: saving {len(images)} images", flush=True)
    run("docker", "image", "save", "--output", target / "images.tar", *images)
    print("bundle: saving the model", flush=True)
    fetch_model(mode)
    place = models_place(images)
    with (target / "models.tar").open("wb") as file:
        carrier = place.export(["models"])
        assert carrier.stdout is not None
        shutil.copyfileobj(carrier.stdout, file)
        if carrier.wait():
            raise PlaceError("the model could not be read from its volume")
    refuse_empty(target / "models.tar", place)
    # As `version` has it: a checkout of another user is as good.
    git = ("git", "-c", f"safe.directory={REPOSITORY}", "-C", REPOSITORY)
    run(*git, "archive", "--format=tar", f"--output={target / 'appliance.tar'}", "HEAD")
    described = {"version": version(), "mode": mode, "services": services, "images": images}
    (target / "bundle.json").write_text(json.dumps(described, indent=1) + "\n")
    parts = [target / name for name in PARTS]
    (target / SUMS).write_text("".join(f"{archive.checksum(path)}  {path.name}\n" for path in parts))
    total = sum(path.stat().st_size for path in parts)
    print(f"bundle: {target}: {total / 1e9:.1f} GB, version {described['version']}, for MODE={mode}")


def refuse_empty(models: Path, place: ComposePlace) -> None:
    """Raises `PlaceError` when no model was carried: the site without a network could not mend that."""
    with tarfile.open(models) as carried:
        if not any(entry.name.endswith("/config.json") for entry in carried):
            where = place.volumes()["models"]
            raise PlaceError(f"no model was carried: {where} has no config.json; see MODEL_CACHE_DIR and MODEL_NAME")


def fetch_model(mode: str) -> None:
    """Runs the one-shots that put the model into its volume."""
    compose(mode, "run", "--rm", "--no-TTY", "model", quiet=False)


def load(source: Path) -> None:
    """Verifies a bundle and installs its images and its model; touches no network."""
    if not (source / SUMS).is_file():
        raise PlaceError(f"{source} holds no finished bundle ({SUMS} is missing)")
    promised = [line.partition("  ") for line in (source / SUMS).read_text().splitlines()]
    sums = {Path(name).name: expected for expected, _, name in promised}
    for name in sorted({*sums, *PARTS}):  # also what a list that was cut off does not name
        part = source / name
        if not part.is_file() or archive.checksum(part) != sums.get(name):
            raise PlaceError(f"{part} is missing or damaged: copy the bundle again")
    described = json.loads((source / "bundle.json").read_text())
    if described["version"] != version():
        print(
            f"load: this checkout is {version()}, the bundle {described['version']}: unpack its appliance.tar",
            flush=True,
        )
    print(f"load: loading {len(described['images'])} images", flush=True)
    run("docker", "image", "load", "--quiet", "--input", source / "images.tar")
    place = models_place(described["images"])
    if "models" not in place.volumes():
        labels = {"project": place.project, "volume": "models"}
        words = [word for name, value in labels.items() for word in ("--label", f"com.docker.compose.{name}={value}")]
        run("docker", "volume", "create", *words, f"{place.project}_models")
    with (source / "models.tar").open("rb") as stream:
        place.replace(stream, ["models"])
    files = " ".join(f"-f {name}" for name in FILES[described["mode"]])
    services = " ".join(described["services"])
    print(f"load: done. Start it: docker compose {files} up -d --no-build --pull never {services}")


def main() -> int:
    """TO names a bundle's folder to write, FROM one to read."""
    verb = sys.argv[1]
    given = os.environ.get("TO" if verb == "bundle" else "FROM")
    if not given:
        raise PlaceError(f"say where: make {verb} {'TO' if verb == 'bundle' else 'FROM'}=folder")
    (bundle if verb == "bundle" else load)(Path(given).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(told(main))
