"""Where known vulnerabilities come from: an OSV service on the network, or a folder or zip of OSV records on a medium.

Records are in the Open Source Vulnerability format (ossf.github.io/osv-schema), as the PyPI advisory database publishes
them. A source that cannot answer raises `CouldNotCheck`; it never looks like "nothing known".
"""

import json
import urllib.error
import urllib.request
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

SERVICE = "https://api.osv.dev"
TIMEOUT_SECONDS = 30
BATCH = 500  # queries a request; the service takes 1,000

Named = tuple[str, str]  # package, version


class CouldNotCheck(Exception):
    """The source cannot be asked or understood; nothing is known about any package."""


@dataclass(frozen=True, order=True)
class Finding:
    """One vulnerability of one locked package. `fixed`: the versions that mend it, empty if there is none."""

    package: str
    version: str
    id: str
    aliases: tuple[str, ...] = ()
    summary: str = ""
    fixed: tuple[str, ...] = ()


def finding(package: Named, record: dict[str, Any]) -> Finding:
    """What a record says about a package."""
    fixed = {
        event["fixed"]
        for affected in _about(record, package[0])
        for spread in affected.get("ranges", ())
        if spread.get("type") == "ECOSYSTEM"
        for event in spread.get("events", ())
        if "fixed" in event
    }
    summary = (record.get("summary") or record.get("details") or "").strip().splitlines()
    return Finding(
        *package,
        record["id"],
        tuple(sorted(record.get("aliases", ()))),
        summary[0][:160] if summary else "",
        tuple(sorted(fixed, key=_order)),
    )


class Service:
    """An OSV service: it matches the versions itself."""

    def __init__(self, url: str = SERVICE) -> None:
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def findings(self, packages: list[Named]) -> list[Finding]:
        """Everything known against `packages`. Raises `CouldNotCheck`."""
        found = []
        for start in range(0, len(packages), BATCH):
            some = packages[start : start + BATCH]
            for package, ids in zip(some, self._ids(some), strict=True):
                records = (self._json(f"/v1/vulns/{one}") for one in ids)
                found += [finding(package, record) for record in records if not record.get("withdrawn")]
        return sorted(found)

    def _ids(self, packages: list[Named]) -> list[list[str]]:
        queries: list[dict[str, Any]] = [
            {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages
        ]
        ids: list[list[str]] = [[] for _ in packages]
        asked = list(range(len(packages)))
        while asked:
            told = self._json("/v1/querybatch", {"queries": [queries[index] for index in asked]})
            results = told.get("results")
            if not isinstance(results, list) or len(results) != len(asked):
                raise CouldNotCheck(f"{self.url} answers in another form")
            more = []
            for index, result in zip(asked, results, strict=True):
                ids[index] += [one["id"] for one in (result or {}).get("vulns", ())]
                if (result or {}).get("next_page_token"):
                    queries[index]["page_token"] = result["next_page_token"]
                    more.append(index)
            asked = more
        return ids

    def _json(self, path: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
                told = json.loads(answer.read())
        except (urllib.error.URLError, OSError, ValueError) as problem:
            raise CouldNotCheck(f"{self.url} cannot be asked: {problem}") from None
        if not isinstance(told, dict):
            raise CouldNotCheck(f"{self.url} answers in another form")
        return told


class Medium:
    """A folder or zip of OSV records, for a site without a network. Versions are matched here."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def findings(self, packages: list[Named]) -> list[Finding]:
        """Everything known against `packages`. Raises `CouldNotCheck`."""
        versions: dict[str, list[str]] = defaultdict(list)
        for name, version in packages:
            versions[name].append(version)
        found, count = set(), 0
        for name, text in self._texts():
            count += 1
            try:
                record = json.loads(text)
                about = {normal(one["package"]["name"]) for one in record.get("affected", ()) if _python(one)}
                if record.get("withdrawn"):
                    continue
                for package in about & versions.keys():
                    found |= {
                        finding((package, version), record)
                        for version in versions[package]
                        if any(affects(affected, version) for affected in _about(record, package))
                    }
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise CouldNotCheck(f"{self.path}: {name} is not an OSV record ({problem!r})") from None
        if not count:
            raise CouldNotCheck(f"{self.path} holds no advisory (*.json)")
        return sorted(found)

    def _texts(self) -> Iterator[tuple[str, bytes]]:
        try:
            if self.path.is_dir():
                for path in sorted(self.path.rglob("*.json")):
                    yield path.name, path.read_bytes()
                return
            with zipfile.ZipFile(self.path) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".json"):
                        yield name, archive.read(name)
        except (OSError, zipfile.BadZipFile) as problem:
            raise CouldNotCheck(f"{self.path} cannot be read: {problem}") from None


def affects(affected: dict[str, Any], version: str) -> bool:
    """Whether one `affected` entry of a record covers a version: listed, or within a range."""
    if version in affected.get("versions", ()):
        return True
    try:
        wanted = Version(version)
    except InvalidVersion:
        return False
    return any(
        _within(spread.get("events", ()), wanted)
        for spread in affected.get("ranges", ())
        if spread.get("type") == "ECOSYSTEM"
    )


def _within(events: Iterable[dict[str, str]], wanted: Version) -> bool:
    inside = False
    # In the order of versions; where one range ends at the version at which the next begins, the end comes first.
    for event in sorted(events, key=lambda one: (_order(next(iter(one.values()))), "introduced" in one)):
        (kind, text), *_ = event.items()
        at = _order(text)
        if kind == "introduced" and wanted >= at:
            inside = True
        elif (kind == "fixed" and wanted >= at) or (kind == "last_affected" and wanted > at):
            inside = False
    return inside


def _order(text: str) -> Version:
    try:
        return Version("0.dev0" if text == "0" else text)
    except InvalidVersion:
        raise ValueError(f"{text!r} is no version") from None


def normal(name: str) -> str:
    """A package's name as lock files write it."""
    return name.replace("_", "-").replace(".", "-").lower()


def _python(affected: dict[str, Any]) -> bool:
    return str(affected.get("package", {}).get("ecosystem", "")).partition(":")[0] == "PyPI"


def _about(record: dict[str, Any], package: str) -> list[dict[str, Any]]:
    return [
        one for one in record.get("affected", ()) if _python(one) and normal(one["package"]["name"]) == normal(package)
    ]
