"""`make backup` and `make restore`: keys, ledger, secrets, certificates in one verified file, taken while serving."""

import contextlib
import datetime as dt
import os
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from scripts.daytwo import archive
from scripts.daytwo.archive import Manifest
from scripts.daytwo.place import STATE, Place, PlaceError, find, run, told
from scripts.daytwo.settings import REPOSITORY, own_certificate, setting

VERSION = Path(__file__).with_name("VERSION")
PAIR = ("fullchain.pem", "privkey.pem")
SELF_SIGNED = "LLM appliance (self-signed)"  # services/init/certificate.py gives its own that name


def version() -> str:
    """The checked-out version, as git tells it; where this is no checkout, as `git archive` wrote it into `VERSION`."""
    # A checkout of another user is as good here: only its name is asked, and cron's root must get its backup.
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        git = ("git", "-c", f"safe.directory={REPOSITORY}", "-C", REPOSITORY)
        return run(*git, "describe", "--tags", "--always", "--dirty").strip()
    packed = VERSION.read_text().split()
    return packed[0] if packed and not packed[0].startswith("$") else "unknown"


def backup(place: Place, target: Path) -> Manifest:
    """One consistent copy of what the appliance must not lose, at `target`. Raises `BackupError`."""
    carrier = place.export()
    assert carrier.stdout is not None
    manifest = Manifest(dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), version(), place.mode)
    try:
        return archive.write(target, carrier.stdout, manifest, complete=lambda: carrier.wait() == 0)
    finally:
        carrier.stdout.close()
        carrier.wait()


def restore(place: Place, source: Path) -> Manifest:
    """Puts a backup back, after it has been verified and what is there now has been backed up itself."""
    with tempfile.TemporaryDirectory() as folder:
        manifest, packed = archive.read(source, Path(folder))
        aside = STATE / "backups" / f"before-restore-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}.tar"
        backup(place, aside)
        print(f"restore: what was there is kept in {aside}", flush=True)
        ran = place.running()
        place.stop()
        try:
            put_back(place, packed)
            put_own_certificate(packed)
        finally:
            if ran:
                place.start()
    return manifest


def put_back(place: Place, packed: Path) -> None:
    """Replaces the folders that a verified state (tar.gz) holds. Nothing may be using them."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "state.tar"
        run("sh", "-c", 'gzip -dc "$1" >"$2"', "sh", packed, plain)
        with plain.open("rb") as state:
            place.replace(state, archive.folders(packed))


def put_own_certificate(packed: Path) -> None:
    """Where the operator's own certificate was served, it is put where the operator keeps it, if nothing is there.

    On another machine that folder is empty, and within a minute the edge would go back to a certificate of its own.
    """
    own = own_certificate()
    if any((own / name).exists() for name in PAIR):
        return
    with tarfile.open(packed, "r:gz") as state, tempfile.TemporaryDirectory() as folder:
        served = [f"edge-certificates/{name}" for name in PAIR]
        if not set(served) <= set(state.getnames()):
            return
        for name in served:
            state.extract(name, folder, filter="data")
        chain, key = (Path(folder) / name for name in served)
        if not lasting_own(chain):
            return
        try:
            own.mkdir(parents=True, exist_ok=True)
            for source, name, mode in ((key, PAIR[1], 0o600), (chain, PAIR[0], 0o644)):
                with os.fdopen(os.open(own / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as file:
                    file.write(source.read_bytes())
        except OSError as problem:
            for name in PAIR:  # one without the other is refused
                with contextlib.suppress(OSError):
                    (own / name).unlink()
            print(f"restore: put your certificate into {own} yourself: {problem.strerror}", flush=True)
        else:
            print(f"restore: your certificate is in {own}", flush=True)


def lasting_own(chain: Path) -> bool:
    """Whether a certificate is neither one that the edge made itself nor one that has ended, which it would refuse."""
    try:
        told = ssl._ssl._test_decode_cert(str(chain))  # type: ignore[attr-defined]  # it has no public way
        names = {value for part in told["subject"] for _, value in part}
        return SELF_SIGNED not in names and ssl.cert_time_to_seconds(told["notAfter"]) > time.time()
    except (ssl.SSLError, KeyError, ValueError):
        return False


def summary(manifest: Manifest) -> str:
    """A backup in one line."""
    rows = {table: count for tables in manifest.tables.values() for table, count in tables.items()}
    counted = ", ".join(f"{count} {table}" for table, count in sorted(rows.items()) if table in TOLD)
    return f"{len(manifest.files)} files of version {manifest.version}, {counted or 'no ledger'}"


TOLD = ("api_keys", "keys", "usage_records")


def backup_verb() -> int:
    """TO names the file; default: a new one under .state/backups."""
    stamp = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}"
    target = Path(os.environ.get("TO") or STATE / "backups" / f"appliance-{stamp}.tar").resolve()
    if target.is_dir():
        target /= f"appliance-{stamp}.tar"
    if setting("DATABASE_URL").startswith("postgresql"):
        print(
            "backup: keys and ledger are in PostgreSQL: back them up with pg_dump; this file has all else", flush=True
        )
    manifest = backup(find(), target)
    print(f"backup: {target}: {summary(manifest)}; read back and verified. It holds secrets: guard it like a key.")
    return 0


def restore_verb() -> int:
    """FROM names the file."""
    if not os.environ.get("FROM"):
        raise PlaceError("say which: make restore FROM=file")
    manifest = restore(find(), Path(os.environ["FROM"]).resolve())
    print(f"restore: {summary(manifest)}, as of {manifest.created_at}")
    return 0


if __name__ == "__main__":
    sys.exit(told(backup_verb if sys.argv[1] == "backup" else restore_verb))
