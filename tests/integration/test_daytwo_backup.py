"""Backup and restore of a local appliance's state, from outside: verbs as processes, files as a user has them."""

import datetime as dt
import json
import os
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.init.certificate import self_signed
from tests.integration.test_daytwo_doctor import certificate

REPOSITORY = Path(__file__).resolve().parents[2]
BOOK = "gateway-data/gateway.sqlite3"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A stopped local appliance: a ledger in WAL mode, a secret, a certificate."""
    state = tmp_path / "state"
    for name in ("gateway-data", "gateway-secrets", "edge-certificates", "models"):
        (state / name).mkdir(parents=True)
    secret = state / "gateway-secrets" / "vllm_api_key"
    secret.write_text("first-secret")
    secret.chmod(0o600)
    (state / "edge-certificates" / "fullchain.pem").write_text("a certificate")
    (state / "models" / "weights").write_text("large and fetched again when lost")
    with sqlite3.connect(state / BOOK) as ledger:
        ledger.execute("PRAGMA journal_mode=WAL")
        ledger.execute("CREATE TABLE usage_records (request_id TEXT UNIQUE, total INTEGER)")
        ledger.execute("CREATE TABLE daily_totals (day TEXT PRIMARY KEY, total INTEGER)")
        ledger.execute("INSERT INTO daily_totals VALUES ('today', 0)")
    ledger.close()
    return state


def verb(name: str, state: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts" / name],
        env={**os.environ, "MODE": "local", "APPLIANCE_STATE": str(state), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def rows(ledger: Path) -> tuple[int, int]:
    """Sum of all records, and the total kept beside them; equal in every committed moment."""
    connection = sqlite3.connect(ledger)
    try:
        records = connection.execute("SELECT coalesce(sum(total), 0) FROM usage_records").fetchone()[0]
        return records, connection.execute("SELECT total FROM daily_totals").fetchone()[0]
    finally:
        connection.close()


@pytest.fixture
def serving(state: Path) -> Iterator[threading.Event]:
    """A ledger that is being written, as fast as it goes, in transactions over two tables."""
    done, first = threading.Event(), threading.Event()

    def write() -> None:
        connection = sqlite3.connect(state / BOOK, isolation_level=None, timeout=60)
        number = 0
        while not done.is_set():
            number += 1
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO usage_records VALUES (?, ?)", (f"request-{number}", number))
            connection.execute("UPDATE daily_totals SET total = total + ?", (number,))
            connection.execute("COMMIT")
            first.set()
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    assert first.wait(60)
    yield done
    done.set()
    writer.join()


def test_backup_while_serving_is_one_moment_of_the_ledger(
    state: Path, serving: threading.Event, tmp_path: Path
) -> None:
    before = rows(state / BOOK)[0]
    for attempt in range(3):
        target = tmp_path / f"backup-{attempt}.tar"
        done = verb("backup", state, TO=str(target))
        assert done.returncode == 0, done.stdout + done.stderr
        with tarfile.open(target) as archive:
            archive.extract("state.tar.gz", tmp_path, filter="data")
        with tarfile.open(tmp_path / "state.tar.gz") as archive:
            archive.extract(BOOK, tmp_path / f"copy-{attempt}", filter="data")
        records, total = rows(tmp_path / f"copy-{attempt}" / BOOK)
        assert records == total > before
        before = records - 1


def test_backup_is_readable_by_its_owner_alone_and_leaves_models_out(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(target)).returncode == 0
    assert target.stat().st_mode & 0o777 == 0o600
    with tarfile.open(target) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert set(manifest["files"]) == {BOOK, "gateway-secrets/vllm_api_key", "edge-certificates/fullchain.pem"}
    assert manifest["tables"] == {BOOK: {"daily_totals": 1, "usage_records": 0}}


def test_restore_brings_back_content_owner_and_mode_and_keeps_what_was_there(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(target)).returncode == 0
    secret = state / "gateway-secrets" / "vllm_api_key"
    secret.write_text("second-secret")
    (state / "gateway-data" / "made-since").write_text("later")
    with sqlite3.connect(state / BOOK) as ledger:
        ledger.execute("INSERT INTO usage_records VALUES ('lost', 1)")
    ledger.close()

    done = verb("restore", state, FROM=str(target))

    assert done.returncode == 0, done.stdout + done.stderr
    assert secret.read_text() == "first-secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert not (state / "gateway-data" / "made-since").exists()
    assert rows(state / BOOK) == (0, 0)
    assert (state / "models" / "weights").exists()
    kept = list((state / "backups").glob("before-restore-*.tar"))
    assert len(kept) == 1
    assert verb("restore", state, FROM=str(kept[0])).returncode == 0
    assert secret.read_text() == "second-secret"
    assert rows(state / BOOK)[0] == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "not-a-backup"])
def test_a_damaged_backup_is_refused_and_changes_nothing(state: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(target)).returncode == 0
    content = bytearray(target.read_bytes())
    if damage == "flipped":
        content[content.rindex(b"\x1f\x8b") + 40] ^= 0xFF
    elif damage == "cut":
        del content[content.rindex(b"\x1f\x8b") + 40 :]
    else:
        content[:] = b"hello"
    target.write_bytes(content)
    (state / "gateway-secrets" / "vllm_api_key").write_text("second-secret")

    done = verb("restore", state, FROM=str(target))

    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith("error: ")
    assert (state / "gateway-secrets" / "vllm_api_key").read_text() == "second-secret"
    assert not (state / "backups").exists()


def test_a_damaged_ledger_is_not_backed_up_as_if_it_were_whole(state: Path, tmp_path: Path) -> None:
    ledger = state / BOOK
    with sqlite3.connect(ledger) as connection:
        connection.executemany("INSERT INTO usage_records VALUES (?, 1)", [(f"r{n}" * 20,) for n in range(2000)])
    connection.close()
    content = bytearray(ledger.read_bytes())
    content[8192:40960] = b"\xff" * 32768
    ledger.write_bytes(content)
    target = tmp_path / "backup.tar"

    done = verb("backup", state, TO=str(target))

    assert done.returncode == 1
    assert "damaged" in done.stdout
    assert not target.exists()


def test_a_stream_may_not_leave_its_folders(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as archive:
        entry = tarfile.TarInfo("gateway-data/../escaped")
        archive.addfile(entry)
    folder = tmp_path / "data"
    folder.mkdir()
    with evil.open("rb") as stream:
        done = subprocess.run(
            [sys.executable, REPOSITORY / "scripts/daytwo/carrier.py", "import", f"gateway-data={folder}"],
            stdin=stream,
            capture_output=True,
        )
    assert done.returncode != 0
    assert not (tmp_path / "escaped").exists()
    assert list(folder.iterdir()) == []


def test_verbs_say_what_to_do_when_there_is_nothing(tmp_path: Path) -> None:
    done = verb("backup", tmp_path / "none")
    assert done.returncode == 1
    assert "make up" in done.stdout
    done = verb("restore", tmp_path / "none")
    assert done.returncode == 1
    assert "FROM=file" in done.stdout


def test_a_full_disk_is_told_in_one_line_and_the_backup_before_stays(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(target)).returncode == 0
    good = target.read_bytes()
    for name in ("one", "two", "three"):
        (state / "gateway-data" / name).write_bytes(os.urandom(200_000))
    # No file may grow beyond 512 blocks: to a program that is a disk without room.
    command = f"trap '' XFSZ; ulimit -f 512; exec {REPOSITORY / 'scripts/backup'}"
    environment = {**os.environ, "MODE": "local", "APPLIANCE_STATE": str(state), "TO": str(target)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 1
    assert done.stdout.startswith(f"error: {target} cannot be written: ")
    assert done.stderr == ""
    assert target.read_bytes() == good
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".backup")] == []


def test_data_that_cannot_be_read_to_its_end_is_no_backup(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.tar"
    target.write_text("the backup of yesterday")
    (state / BOOK).write_bytes(b"SQLite format 3\x00" + b"\xff" * 4096)

    done = verb("backup", state, TO=str(target))

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert BOOK in done.stderr
    assert done.stdout.startswith("error: ")
    assert target.read_text() == "the backup of yesterday"


def test_a_note_that_a_full_disk_has_emptied_stops_no_backup(state: Path, tmp_path: Path) -> None:
    (state / "deployed.json").write_text("")
    done = verb("backup", state, TO=str(tmp_path / "backup.tar"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_site_without_git_backs_up_and_knows_its_version(state: Path, tmp_path: Path) -> None:
    """What a bundle carries is `git archive`'s: no checkout, and perhaps a machine without git."""
    site = tmp_path / "site"
    site.mkdir()
    packed = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", "--format=tar", "HEAD"], check=True, capture_output=True
    ).stdout
    subprocess.run(["tar", "-x", "-C", site], input=packed, check=True)
    head = ["git", "-C", REPOSITORY, "describe", "--tags", "--always", "HEAD"]
    version = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    environment = {**os.environ, "MODE": "local", "APPLIANCE_STATE": str(state), "TO": str(tmp_path / "backup.tar")}

    done = subprocess.run([site / "scripts/backup"], env=environment, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"of version {version}" in done.stdout


@pytest.mark.parametrize("whose", ["own", "own-ended", "self-signed", "another-is-there"])
def test_a_certificate_of_ones_own_moves_to_another_machine(state: Path, tmp_path: Path, whose: str) -> None:
    """Served alone it would be replaced within a minute: only what lies in the operator's folder stays."""
    now, own, served = dt.datetime.now(dt.UTC), tmp_path / "own", state / "edge-certificates"
    if whose == "self-signed":
        chain, key = self_signed((), now)
    else:
        days = -1 if whose == "own-ended" else 60
        chain = key = certificate(tmp_path, now + dt.timedelta(days=days), "llm.example").read_bytes()
    (served / "fullchain.pem").write_bytes(chain)
    (served / "privkey.pem").write_bytes(key)
    backup = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(backup)).returncode == 0
    if whose == "another-is-there":
        own.mkdir()
        (own / "fullchain.pem").write_text("newer")

    done = verb("restore", state, FROM=str(backup), CERTIFICATES_DIR=str(own))

    assert done.returncode == 0, done.stdout + done.stderr
    there = {path.name: path.read_bytes() for path in own.iterdir()} if own.exists() else {}
    moved = {"fullchain.pem": chain, "privkey.pem": key}
    assert there == {"own": moved, "another-is-there": {"fullchain.pem": b"newer"}}.get(whose, {})
    assert (f"your certificate is in {own}" in done.stdout) == (whose == "own")
    if whose == "own":
        assert (own / "privkey.pem").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_takes_no_certificate_stops_no_restore(state: Path, tmp_path: Path) -> None:
    pair = certificate(tmp_path, dt.datetime.now(dt.UTC) + dt.timedelta(days=60), "llm.example").read_bytes()
    for name in ("fullchain.pem", "privkey.pem"):
        (state / "edge-certificates" / name).write_bytes(pair)
    backup = tmp_path / "backup.tar"
    assert verb("backup", state, TO=str(backup)).returncode == 0
    own = tmp_path / "backup.tar" / "own"  # no folder can be there, also for root
    done = verb("restore", state, FROM=str(backup), CERTIFICATES_DIR=str(own))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"put your certificate into {own} yourself: Not a directory" in done.stdout
