"""`make audit`: what is known against the packages that we lock, image by image.

Asks an OSV service (AUDIT_URL), or reads a medium (AUDIT_ADVISORIES=folder or zip) where there is no network.
`requirements/audit.toml` may set a finding aside, with its reason and a day on which it is looked at again.
Exit status: 0 nothing open, 1 something open, 2 wrong use, 3 could not check.
"""

import datetime as dt
import os
import sys
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.supply.advisories import SERVICE, CouldNotCheck, Finding, Medium, Service
from scripts.supply.locks import DOCKERFILES, REPOSITORY, LockError, contents

CLEAN, OPEN, WRONG_USE, UNKNOWN = 0, 1, 2, 3
ASIDE = REPOSITORY / "requirements" / "audit.toml"


class WrongUse(Exception):
    """The file of findings set aside, or an argument, cannot be used; the message says why."""


@dataclass(frozen=True)
class Aside:
    """A finding that is not acted upon now."""

    id: str
    package: str
    reason: str
    until: dt.date


def asides(path: Path) -> list[Aside]:
    """What is set aside; each with a reason and a day. Raises `WrongUse`."""
    if not path.exists():
        return []
    try:
        told: list[dict[str, Any]] = tomllib.loads(path.read_text()).get("aside", [])
    except (tomllib.TOMLDecodeError, OSError) as problem:
        raise WrongUse(f"{path}: {problem}") from None
    found = []
    for entry in told:
        name = f"{path.name}: {entry.get('id', '?')}"
        if set(entry) != {"id", "package", "reason", "until"}:
            raise WrongUse(f"{name}: needs id, package, reason and until, and nothing else")
        if not str(entry["reason"]).strip() or not isinstance(entry["until"], dt.date):
            raise WrongUse(f"{name}: needs a reason in words, and a day like 2030-01-31 without quotes")
        found.append(Aside(**entry))
    return found


def locked() -> dict[tuple[str, str], list[str]]:
    """Every locked `(package, version)` and the images that hold it. Raises `LockError`."""
    holders: dict[tuple[str, str], list[str]] = defaultdict(list)
    for image in DOCKERFILES:
        for package in contents(image):
            holders[package.name, package.version].append(image)
    return dict(holders)


def describe(found: Finding, images: list[str]) -> str:
    """A finding in a line."""
    names = ", ".join((found.id, *found.aliases))
    mend = f"mended in {', '.join(found.fixed)}" if found.fixed else "NO FIX YET"
    return f"{found.package} {found.version} ({', '.join(images)}): {names}: {mend}. {found.summary}".rstrip()


def report(found: list[Finding], holders: dict[tuple[str, str], list[str]], aside: list[Aside], today: dt.date) -> int:
    """Print what was found; returns how many findings are open."""
    used, still_open = set(), 0
    for one in found:
        line = describe(one, holders[one.package, one.version])
        names = {one.id, *one.aliases}
        entry = next((a for a in aside if a.id in names and a.package == one.package), None)
        if entry is not None:
            used.add(entry)
        if entry is not None and entry.until >= today:
            print(f"set aside until {entry.until}: {line}\n    because: {entry.reason}")
            continue
        still_open += 1
        print(f"VULNERABLE: {line}")
        if entry is not None:
            print(f"    it was set aside until {entry.until}: {entry.reason}")
    for entry in aside:
        if entry not in used:
            print(f"note: {entry.id} of {entry.package} is set aside but not found any more: remove it")
    return still_open


def main() -> int:
    """Check, and say what came out of it in the last line."""
    medium = os.environ.get("AUDIT_ADVISORIES")
    source = Medium(Path(medium)) if medium else Service(os.environ.get("AUDIT_URL") or SERVICE)
    try:
        aside = asides(Path(os.environ.get("AUDIT_ASIDE") or ASIDE))
        holders = locked()
        found = source.findings(sorted(holders))
    except CouldNotCheck as problem:
        print(f"audit: COULD NOT CHECK, nothing is known: {problem}", file=sys.stderr)
        print(
            "audit: without a network, bring the advisories on a medium: AUDIT_ADVISORIES=folder or zip",
            file=sys.stderr,
        )
        return UNKNOWN
    except (WrongUse, LockError) as problem:
        print(f"audit: {problem}", file=sys.stderr)
        return WRONG_USE
    still_open = report(found, holders, aside, dt.datetime.now(dt.UTC).date())
    print(
        f"audit: {len(holders)} locked packages of {len(DOCKERFILES)} images against {source}: "
        f"{still_open} open, {len(found) - still_open} set aside"
    )
    return OPEN if still_open else CLEAN


if __name__ == "__main__":
    sys.exit(main())
