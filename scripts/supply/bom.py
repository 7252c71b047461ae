"""`make sbom`: a CycloneDX document for each of our images, and one for the appliance. The same input, the same bytes.

Python packages come from the lock files that the Dockerfiles install with `--require-hashes`. Debian's packages are
added where the image exists in this machine's Docker; where it does not, the document says so.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from scripts.supply.locks import DOCKERFILES, REPOSITORY, LockError, Package, built_on, contents, lock_files, pulled

SPACE = uuid.UUID("6f1d2a60-0d0c-5b52-9a6e-5a4f2c1d7e11")  # of our serial numbers
Component = dict[str, Any]


def tag(image: str) -> str:
    """An image's name as compose.yaml builds it."""
    return f"{os.environ.get('APPLIANCE_PREFIX', 'appliance')}/{image}:{os.environ.get('APPLIANCE_VERSION', 'dev')}"


def python_component(package: Package) -> Component:
    """A locked package. Its hashes are those of all files that the lock admits: one of them is installed."""
    purl = f"pkg:pypi/{package.name}@{package.version.replace('+', '%2B')}"
    component: Component = {
        "type": "library",
        "bom-ref": purl,
        "name": package.name,
        "version": package.version,
        "purl": purl,
    }
    if package.hashes:
        component["hashes"] = [{"alg": "SHA-256", "content": one} for one in package.hashes]
    told = {"marker": package.marker, "optional": package.optional}
    if any(told.values()):
        component["properties"] = [
            {"name": f"appliance:{name}", "value": value} for name, value in told.items() if value
        ]
    return component


def image_component(name: str, role: str) -> Component:
    """An image that is pulled, by name and tag, or by digest where one is pinned."""
    plain, _, digest = name.partition("@")
    at = plain.rpartition(":")
    repository, version = (at[0], at[2]) if at[0] and "/" not in at[2] else (plain, digest or "latest")
    return {
        "type": "container",
        "bom-ref": f"image:{name}",
        "name": repository,
        "version": version,
        "properties": [{"name": "appliance:role", "value": role}],
    }


def debian_components(status: str) -> list[Component]:
    """The installed packages of a dpkg status file."""
    found = []
    for block in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
        if fields.get("Status", "").endswith(" installed"):
            name, version, cpu = fields["Package"], fields["Version"], fields.get("Architecture", "all")
            quoted = version.replace("+", "%2B").replace(":", "%3A")
            purl = f"pkg:deb/debian/{name}@{quoted}?arch={cpu}"
            found.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return sorted(found, key=lambda component: component["bom-ref"])


def dpkg_status(name: str) -> str | None:
    """The package database inside a built image; None where Docker or the image is not here."""
    docker = shutil.which("docker")
    if docker is None:
        return None
    known = subprocess.run([docker, "image", "inspect", name], capture_output=True, check=False)
    if known.returncode != 0:
        return None
    read = subprocess.run(
        [docker, "run", "--rm", "--network", "none", "--entrypoint", "cat", name, "/var/lib/dpkg/status"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if read.returncode != 0:
        raise LockError(f"{name}: its Debian packages cannot be read: {read.stderr.strip()[:200]}")
    return read.stdout


def document(name: str, components: list[Component], notes: dict[str, str]) -> dict[str, Any]:
    """A CycloneDX 1.6 document. No time, and a serial number made from the content: it can be compared."""
    body = {
        "metadata": {
            "component": {"type": "container", "bom-ref": f"appliance:{name}", "name": name},
            "properties": [{"name": f"appliance:{key}", "value": value} for key, value in sorted(notes.items())],
        },
        "components": components,
        "dependencies": [{"ref": f"appliance:{name}", "dependsOn": sorted(one["bom-ref"] for one in components)}],
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{uuid.uuid5(SPACE, digest)}"}
    return {**head, "version": 1, **body}


def image_document(image: str, status: str | None) -> dict[str, Any]:
    """What one of our images holds. `status`: its dpkg status file, None when it is not known."""
    notes = {
        "locks": " ".join(str(lock.relative_to(REPOSITORY)) for lock in lock_files(image)),
        "debian": "as installed in the image" if status is not None else "not listed: the image is not on this machine",
    }
    components = [
        image_component(built_on(image), "built on"),
        *map(python_component, contents(image)),
    ]
    return document(image, components + (debian_components(status) if status is not None else []), notes)


def appliance_document() -> dict[str, Any]:
    """The images of the whole appliance: ours, and those that are pulled."""
    ours = [
        {"type": "container", "bom-ref": f"appliance:{image}", "name": image,
         "externalReferences": [{"type": "bom", "url": f"./{image}.cdx.json"}]}
        for image in DOCKERFILES
    ]  # fmt: skip
    return document("appliance", ours + [image_component(name, role) for role, name in pulled().items()], {})


def main(argv: list[str]) -> int:
    """Write the documents; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sbom", description=__doc__)
    parser.add_argument("--to", type=Path, default=REPOSITORY / ".state" / "sbom", help="folder")
    parser.add_argument("--no-docker", action="store_true", help="do not look for built images")
    options = parser.parse_args(argv)
    options.to.mkdir(parents=True, exist_ok=True)
    try:
        for image in DOCKERFILES:
            status = None if options.no_docker else dpkg_status(tag(image))
            told = write(options.to, image, image_document(image, status))
            missing = "" if status is not None else f"; Debian's packages are not in it: {tag(image)} is not built here"
            print(f"sbom: {told}{missing}")
        print(f"sbom: {write(options.to, 'appliance', appliance_document())}")
    except (LockError, OSError) as problem:
        print(f"sbom: {problem}", file=sys.stderr)
        return 1
    return 0


def write(folder: Path, name: str, content: dict[str, Any]) -> str:
    """Writes one document; returns a line about it."""
    path = folder / f"{name}.cdx.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return f"{path}: {len(content['components'])} components"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
