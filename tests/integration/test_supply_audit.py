"""`make audit` and `make sbom` from outside: a planted vulnerability is found, silence is never taken for safety."""

import datetime as dt
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from scripts.supply.locks import DOCKERFILES, lock_files, packages

ROOT = Path(__file__).resolve().parents[2]
PLANTED = next(package for package in packages(ROOT / "requirements" / "gateway.txt") if package.name == "aiohttp")


def advisory(name: str = PLANTED.name, fixed: str | None = None, **more: Any) -> dict[str, Any]:
    """A record that hits everything below `fixed`, or every version."""
    events = [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]
    return {
        "id": "PYSEC-2030-1",
        "aliases": ["CVE-2030-1234"],
        "summary": "It does what it must not.",
        "affected": [
            {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [{"type": "ECOSYSTEM", "events": events}]}
        ],
        **more,
    }


def audit(**environment: str | Path) -> subprocess.CompletedProcess[str]:
    """`scripts/audit` with nothing of this machine's settings."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "scripts" / "audit"],
        env={"PATH": path, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=240,
    )


def medium(folder: Path, *records: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, record in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(record))
    return folder


@contextmanager
def service(*records: dict[str, Any]) -> Iterator[str]:
    """An OSV service that knows `records`, each hitting whatever version is asked; two pages where there are two."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))["queries"]
            results: list[dict[str, Any]] = []
            for query in asked:
                known = [r for r in records if r["affected"][0]["package"]["name"] == query["package"]["name"]]
                page = int(query.get("page_token", 0))
                result: dict[str, Any] = {"vulns": [{"id": known[page]["id"]}]} if known else {}
                if page + 1 < len(known):
                    result["next_page_token"] = str(page + 1)
                results.append(result)
            self.tell({"results": results})

        def do_GET(self) -> None:
            self.tell(next(r for r in records if self.path == f"/v1/vulns/{r['id']}"))

        def tell(self, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_planted_vulnerability_is_found_with_its_mend(tmp_path):
    told = audit(AUDIT_ADVISORIES=medium(tmp_path / "m", advisory(fixed="9999.1")))
    assert told.returncode == 1, told
    assert f"VULNERABLE: {PLANTED.name} {PLANTED.version} (gateway" in told.stdout
    assert "PYSEC-2030-1, CVE-2030-1234: mended in 9999.1. It does what it must not." in told.stdout


def test_a_vulnerability_without_a_fix_is_said_to_have_none(tmp_path):
    told = audit(AUDIT_ADVISORIES=medium(tmp_path / "m", advisory()))
    assert told.returncode == 1
    assert "NO FIX YET" in told.stdout


@pytest.mark.parametrize(
    "record",
    [
        advisory("nobody-uses-this"),
        advisory(fixed=PLANTED.version),
        advisory(withdrawn="2030-01-01T00:00:00Z"),
        {**advisory(), "affected": [{"package": {"name": PLANTED.name, "ecosystem": "npm"}, "versions": ["1"]}]},
    ],
    ids=["another package", "mended in ours", "withdrawn", "another ecosystem"],
)
def test_what_does_not_concern_us_is_clean(tmp_path, record):
    told = audit(AUDIT_ADVISORIES=medium(tmp_path / "m", record))
    assert told.returncode == 0, told
    assert "0 open, 0 set aside" in told.stdout


def test_a_listed_version_counts_without_a_range_and_in_a_zip(tmp_path):
    record = advisory()
    record["affected"] = [
        {"package": {"name": PLANTED.name.upper(), "ecosystem": "PyPI"}, "versions": [PLANTED.version]}
    ]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("PYSEC-2030-1.json", json.dumps(record))
    assert audit(AUDIT_ADVISORIES=tmp_path / "all.zip").returncode == 1


def test_a_service_is_asked_page_by_page():
    second = {**advisory(fixed="9999.1"), "id": "PYSEC-2030-2", "aliases": []}
    with service(advisory(), second) as url:
        told = audit(AUDIT_URL=url)
    assert told.returncode == 1, told
    assert told.stdout.count("VULNERABLE") == 2
    with service(advisory("nobody-uses-this")) as url:
        assert audit(AUDIT_URL=url).returncode == 0


def test_what_cannot_be_checked_is_not_clean(tmp_path):
    """No service, no medium, an empty medium, something else than advisories: a status of its own, in plain words."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.json").write_text("{}}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.zip").write_text("no zip")
    for environment in (
        {"AUDIT_URL": "http://127.0.0.1:9"},
        *({"AUDIT_ADVISORIES": tmp_path / name} for name in ("missing", "empty", "broken", "no.zip")),
    ):
        told = audit(**environment)
        assert told.returncode == 3, (environment, told)
        assert "COULD NOT CHECK" in told.stderr
        assert "Traceback" not in told.stderr
        assert "open" not in told.stdout


def test_set_aside_with_a_reason_until_a_day(tmp_path):
    advisories = medium(tmp_path / "m", advisory(fixed="9999.1"))
    aside = tmp_path / "aside.toml"
    today = dt.datetime.now(dt.UTC).date()
    entry = '[[aside]]\nid = "CVE-2030-1234"\npackage = "aiohttp"\nreason = "we never call it"\nuntil = {}\n'
    aside.write_text(entry.format(today))
    told = audit(AUDIT_ADVISORIES=advisories, AUDIT_ASIDE=aside)
    assert told.returncode == 0, told
    assert "because: we never call it" in told.stdout
    aside.write_text(entry.format(today - dt.timedelta(days=1)))
    assert audit(AUDIT_ADVISORIES=advisories, AUDIT_ASIDE=aside).returncode == 1
    aside.write_text(entry.format(today).replace("we never call it", " "))
    told = audit(AUDIT_ADVISORIES=advisories, AUDIT_ASIDE=aside)
    assert (told.returncode, "reason" in told.stderr) == (2, True)
    aside.write_text(entry.format(today).replace("aiohttp", "nobody-uses-this"))
    told = audit(AUDIT_ADVISORIES=advisories, AUDIT_ASIDE=aside)
    assert told.returncode == 1
    assert "remove it" in told.stdout


def test_the_bills_of_materials_list_every_locked_package_and_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, "-m", "scripts.supply.bom", "--no-docker", "--to", tmp_path / name],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    for image in DOCKERFILES:
        text = (tmp_path / "one" / f"{image}.cdx.json").read_bytes()
        assert text == (tmp_path / "two" / f"{image}.cdx.json").read_bytes()
        listed = {
            (one["name"], one["version"]): {h["content"] for h in one["hashes"]}
            for one in json.loads(text)["components"]
            if one.get("purl", "").startswith("pkg:pypi/") and one["name"] != "torch"  # scripts/engine-cpu says why
        }
        locked = {(one.name, one.version): set(one.hashes) for lock in lock_files(image) for one in packages(lock)}
        assert listed == locked
        # Counted another way: a line with `==` is a package.
        lines = {
            line.partition(" ")[0]
            for lock in lock_files(image)
            for line in lock.read_text().splitlines()
            if line[:1].isalnum() and "==" in line
        }
        assert len(listed) == len(lines)


def test_debian_packages_are_listed_where_the_image_is_here_and_missed_aloud_where_not(tmp_path):
    """A program named docker stands for Docker: it has one of our images."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    status = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.41-12\n"
    docker.write_text(
        '#!/bin/sh\ncase "$*" in\n"image inspect appliance/gateway:dev") exit 0 ;;\n'
        f'"run --rm --network none --entrypoint cat appliance/gateway:dev "*) printf %s "{status}" ;;\n*) exit 1 ;;\nesac\n'
    )
    docker.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "scripts.supply.bom", "--to", tmp_path / "out"],
        cwd=ROOT, env={"PATH": f"{docker.parent}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = json.loads((tmp_path / "out" / "gateway.cdx.json").read_text())
    assert "pkg:deb/debian/libc6@2.41-12?arch=amd64" in {one.get("purl") for one in listed["components"]}
    assert "appliance/init:dev is not built here" in done.stdout
    assert "appliance/gateway:dev" not in done.stdout
    told = json.loads((tmp_path / "out" / "init.cdx.json").read_text())["metadata"]["properties"]
    assert {"name": "appliance:debian", "value": "not listed: the image is not on this machine"} in told
