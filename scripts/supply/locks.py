"""What each image of ours is made of, as far as the checkout tells: lock files and images it is built on."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = {
    "init": "services/init/Dockerfile",
    "gateway": "services/gateway/Dockerfile",
    "gpu-exporter": "services/gpu-exporter/Dockerfile",
    "engine": "services/vllm/Dockerfile",
    "engine-cpu": "services/vllm/Dockerfile.cpu",
}
# Lock files of which an image holds nothing unless it was built with the argument.
OPTIONAL = {"requirements/ray.txt": "WITH_RAY"}
_PACKAGE = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^ ;\\]+)(?: *; *([^\\]+?))? *\\?$")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


class LockError(Exception):
    """A lock file or Dockerfile cannot be read; the message says which and why."""


@dataclass(frozen=True, order=True)
class Package:
    """One locked Python package. `hashes` are SHA-256 of the files that may be installed, `marker` where it applies,
    `optional` the build argument without which an image has it not."""

    name: str
    version: str
    marker: str = ""
    hashes: tuple[str, ...] = ()
    optional: str = ""


def packages(lock: Path) -> list[Package]:
    """The packages of a hash-locked requirements file, by name. Raises `LockError`."""
    found: list[Package] = []
    for number, line in enumerate(lock.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith((" ", "\t")):
            hashes = _HASH.findall(line)
            if not found or not hashes:
                raise LockError(f"{lock.name}, line {number}: not understood: {line.strip()[:80]}")
            last = found.pop()
            found.append(Package(last.name, last.version, last.marker, (*last.hashes, *hashes)))
            continue
        match = _PACKAGE.match(line)
        if match is None:
            raise LockError(f"{lock.name}, line {number}: not a locked package: {line[:80]}")
        name = re.sub(r"[-_.]+", "-", match[1]).lower()
        found.append(Package(name, match[2], match[3] or ""))
    for package in found:
        if not package.hashes:
            raise LockError(f"{lock.name}: {package.name} has no hash")
    return sorted(found)


def dockerfile(image: str) -> str:
    """The text of an image's Dockerfile."""
    return (REPOSITORY / DOCKERFILES[image]).read_text()


def lock_files(image: str) -> list[Path]:
    """The lock files that an image's Dockerfile copies and installs, in order. Raises `LockError`."""
    text = dockerfile(image).replace("\\\n", " ")
    copied: dict[str, str] = {}  # where it lies in the image → where it lies in the checkout
    for line in re.findall(r"^COPY (requirements/.*)$", text, re.MULTILINE):
        *sources, target = line.split()
        copied |= {target + Path(source).name if target.endswith("/") else target: source for source in sources}
    installed = re.findall(r"(?:-r|--requirement) +(\S+)", text)
    unknown = [name for name in installed if name not in copied]
    if unknown:
        raise LockError(f"{DOCKERFILES[image]} installs {unknown[0]}, which it does not copy from requirements/")
    if not copied:
        raise LockError(f"{DOCKERFILES[image]} copies no lock file")
    return [REPOSITORY / name for name in dict.fromkeys(copied.values())]


def unlocked(image: str) -> list[Package]:
    """Packages with a fixed version but no hash: torch's CPU build alone, whose origin differs (scripts/engine-cpu)."""
    if image != "engine-cpu":
        return []
    version = re.search(r"^torch=(\S+)", (REPOSITORY / "scripts" / "engine-cpu").read_text(), re.MULTILINE)
    if version is None:
        raise LockError("scripts/engine-cpu names no version of torch")
    return [Package("torch", version[1])]


def contents(image: str) -> list[Package]:
    """Every Python package of an image that the checkout knows, once. Raises `LockError`."""
    once: dict[tuple[str, str], Package] = {}
    for lock in lock_files(image):
        argument = OPTIONAL.get(str(lock.relative_to(REPOSITORY)), "")
        for one in packages(lock):
            known = once.get((one.name, one.version))
            if known is None or (known.optional and not argument):
                once[one.name, one.version] = replace(one, optional=argument)
    return sorted([*once.values(), *unlocked(image)])


def built_on(image: str) -> str:
    """The default of the image that an image is built on: name and tag."""
    text = dockerfile(image)
    used = re.search(r"^FROM \$\{(\w+)\}", text, re.MULTILINE)
    default = used and re.search(rf"^ARG {used[1]}=(\S+)", text, re.MULTILINE)
    if not default:
        raise LockError(f"{DOCKERFILES[image]}: no image it is built on")
    return default[1]


def pulled() -> dict[str, str]:
    """Every image of `compose.yaml` that is pulled: role → name and tag."""
    text = (REPOSITORY / "compose.yaml").read_text()
    section = re.search(r"^x-images:\n((?:  .*\n)+)", text, re.MULTILINE)
    if section is None:
        raise LockError("compose.yaml has no x-images")
    return dict(re.findall(r"^  ([\w-]+):.*?\$\{\w+:-([^}]+)\}", section[1], re.MULTILINE))
