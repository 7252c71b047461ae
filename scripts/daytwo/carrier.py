"""Carries folders as a tar stream: `carrier.py export|import NAME=FOLDER…`, stream on standard output or input.

Runs beside the data: as a process of this machine, or inside a container that mounts the volumes. Therefore it is one
file of its own that imports nothing of ours. SQLite files are copied through SQLite's online backup, so that a copy
taken while the appliance serves is one moment of its database, never a torn one.
"""

import os
import shutil
import sqlite3
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import BinaryIO

MAGIC = b"SQLite format 3\x00"
SIDE_FILES = ("-wal", "-shm", "-journal")


def is_sqlite(path: Path) -> bool:
    """Whether the file is an SQLite database."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def copy_file(source: Path, target: Path) -> bool:
    """One moment of a file that may be in use; False when it has gone meanwhile."""
    try:
        if is_sqlite(source):
            copy_database(source, target)
        else:
            shutil.copyfile(source, target)
    except FileNotFoundError:
        return False
    return True


def copy_database(source: Path, target: Path) -> None:
    """One consistent moment of a database that may be in use. Raises `sqlite3.Error` if it cannot be read."""
    origin, copy = sqlite3.connect(source, timeout=30), sqlite3.connect(target)
    try:
        origin.backup(copy)
    finally:
        copy.close()
        origin.close()


def export(folders: dict[str, Path], stream: BinaryIO) -> None:
    """Writes every file below the folders, with owner and mode, as NAME/relative/path. Raises `OSError`."""
    with tarfile.open(fileobj=stream, mode="w|") as archive, tempfile.TemporaryDirectory() as scratch:
        for name, folder in folders.items():
            archive.add(folder, arcname=name, recursive=False)
            for path in sorted(folder.rglob("*")):
                arcname = f"{name}/{path.relative_to(folder)}"
                if path.name.endswith(SIDE_FILES) or path.is_symlink() or not (path.is_file() or path.is_dir()):
                    continue
                if path.is_dir():
                    archive.add(path, arcname=arcname, recursive=False)
                    continue
                # Files come and go, grow and shrink while the appliance serves: what is packed is a copy that does not.
                copy = Path(scratch) / "copy"
                try:
                    entry = archive.gettarinfo(path, arcname)
                    there = copy_file(path, copy)
                except FileNotFoundError:
                    there = False
                except sqlite3.Error as problem:
                    raise OSError(f"{arcname} cannot be copied: {problem}") from None
                if there:
                    entry.size = copy.stat().st_size
                    with copy.open("rb") as content:
                        archive.addfile(entry, content)
                copy.unlink(missing_ok=True)


def replace(folders: dict[str, Path], stream: BinaryIO) -> None:
    """Makes each folder that the stream carries hold exactly what the stream holds for it.

    Everything is unpacked beside the old content first; only a complete stream replaces anything.
    """
    incoming = {name: folder / f".incoming.{os.getpid()}" for name, folder in folders.items()}
    carried = set()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for entry in archive:
                name, _, rest = entry.name.partition("/")
                if name not in folders or ".." in Path(rest).parts or not (entry.isfile() or entry.isdir()):
                    raise SystemExit(f"carrier: unexpected entry {entry.name!r}")
                carried.add(name)
                entry.name = rest or "."
                incoming[name].mkdir(exist_ok=True)
                archive.extract(entry, incoming[name], numeric_owner=True, filter="fully_trusted")
        for name in carried:
            folder = folders[name]
            for old in folder.iterdir():
                if old == incoming[name]:
                    continue
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            for new in incoming[name].iterdir():
                new.rename(folder / new.name)
            arrived = incoming[name].stat()
            folder.chmod(arrived.st_mode & 0o7777)
            os.chown(folder, arrived.st_uid, arrived.st_gid)
        os.sync()
    finally:
        for folder in incoming.values():
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    named = {name: Path(folder) for name, _, folder in (argument.partition("=") for argument in sys.argv[2:])}
    try:
        if sys.argv[1] == "export":
            export(named, sys.stdout.buffer)
        else:
            replace(named, sys.stdin.buffer)
    except BrokenPipeError:
        os._exit(1)  # who reads has given up, and says why
    except (OSError, tarfile.TarError) as problem:
        raise SystemExit(f"carrier: {problem}") from None
