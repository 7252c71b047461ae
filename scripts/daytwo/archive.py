"""A backup file: a tar with `manifest.json` and `state.tar.gz`, readable by its owner alone."""

import gzip
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from scripts.daytwo.carrier import MAGIC, SIDE_FILES

FORMAT = 1


class BackupError(Exception):
    """A backup that cannot be made or trusted; the message says why in one line."""


@dataclass
class Manifest:
    """What a backup holds. `tables` counts rows by database and table, `forms` is a digest of each database's schema;
    `checksum` is SHA-256 of the state (tar.gz)."""

    created_at: str
    version: str
    mode: str
    checksum: str = ""
    files: dict[str, int] = field(default_factory=dict)
    tables: dict[str, dict[str, int]] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def write(target: Path, state: IO[bytes], manifest: Manifest, complete: Callable[[], bool] = lambda: True) -> Manifest:
    """Packs the state stream (tar) under the manifest, verified by reading it back, and puts it in place whole.

    `complete` is asked once the stream has ended: whether it ended because everything was told. Raises `BackupError`;
    what `target` held before is then still there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _write(target, state, manifest, complete)
    except OSError as problem:
        raise BackupError(f"{target} cannot be written: {problem.strerror or problem}") from None


def _write(target: Path, state: IO[bytes], manifest: Manifest, complete: Callable[[], bool]) -> Manifest:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".backup.") as folder:
        packed = Path(folder) / "state.tar.gz"
        with packed.open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0, compresslevel=6) as squeezed:
            shutil.copyfileobj(state, squeezed)
        if not complete():
            raise BackupError("the appliance's data could not be read to its end")
        manifest.checksum = checksum(packed)
        manifest.files, manifest.tables, manifest.forms = inspect(packed)
        whole = Path(folder) / "whole.tar"
        described = Path(folder) / "manifest.json"
        described.write_text(json.dumps(asdict(manifest), indent=1))
        with os.fdopen(os.open(whole, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.add(described, "manifest.json")
                archive.add(packed, "state.tar.gz")
            file.flush()
            os.fsync(file.fileno())
        whole.replace(target)
    return manifest


def read(source: Path, folder: Path) -> tuple[Manifest, Path]:
    """The manifest and the verified state (tar.gz, unpacked into `folder`). Raises `BackupError`."""
    try:
        with tarfile.open(source) as archive:
            for name in ("manifest.json", "state.tar.gz"):
                archive.extract(name, folder, filter="data")
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError) as problem:
        raise BackupError(f"{source} is not a backup of this appliance ({first_line(problem)})") from None
    if manifest.format != FORMAT:
        raise BackupError(f"{source} has format {manifest.format}; this version reads {FORMAT}")
    packed = folder / "state.tar.gz"
    if checksum(packed) != manifest.checksum:
        raise BackupError(f"{source} is damaged: its checksum does not match its manifest")
    inspect(packed)
    return manifest, packed


def folders(packed: Path) -> list[str]:
    """Names of the folders that the state holds, also empty ones."""
    with tarfile.open(packed, "r:gz") as archive:
        return sorted({name.partition("/")[0] for name in archive.getnames()})


def inspect(packed: Path) -> tuple[dict[str, int], dict[str, dict[str, int]], dict[str, str]]:
    """Sizes by file; rows by table, and the form, of every database, each checked for integrity.

    Raises `BackupError`.
    """
    files: dict[str, int] = {}
    forms: dict[str, str] = {}
    tables: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(packed, "r:gz") as archive, tempfile.TemporaryDirectory(dir=packed.parent) as scratch:
            for entry in archive:
                if not entry.isfile():
                    continue
                files[entry.name] = entry.size
                content = archive.extractfile(entry)
                if content is None or entry.name.endswith(SIDE_FILES):
                    continue
                head = content.read(len(MAGIC))
                if head == MAGIC:
                    database = Path(scratch) / "database"
                    with database.open("wb") as file:
                        file.write(head)
                        shutil.copyfileobj(content, file)
                    tables[entry.name], forms[entry.name] = count_rows(entry.name, database)
                    database.unlink()
    except (OSError, EOFError, tarfile.TarError) as problem:
        raise BackupError(f"the state cannot be read back ({first_line(problem)})") from None
    return files, tables, forms


def count_rows(name: str, database: Path) -> tuple[dict[str, int], str]:
    """Rows by table, and a digest of the schema. Raises `BackupError` when SQLite finds the file damaged."""
    connection = sqlite3.connect(f"file:{database}?mode=ro&immutable=1", uri=True)
    try:
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise BackupError(f"{name} is damaged: {verdict}")
        listed = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        rows = {
            table: connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]
            for (table,) in listed
            if not table.startswith("sqlite_")
        }
        schema = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY sql").fetchall()
        return rows, hashlib.sha256(repr(schema).encode()).hexdigest()
    except sqlite3.Error as problem:
        raise BackupError(f"{name} is damaged: {problem}") from None
    finally:
        connection.close()


def checksum(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(problem: Exception) -> str:
    """A library's message, cut to what fits into ours."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]
