"""Where ended calls are kept while the database refuses: one file, appended and fsynced, replayed in order.

A record counts as kept when `append` returns. A line that was cut by a crash was never acknowledged and is skipped.
Replaying is harmless twice (records are settled by request id), so the file is emptied only after the database has
committed what was in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from gateway.call import UsageRecord

_decoder = msgspec.json.Decoder(UsageRecord)


class Spool:
    """The file `usage.spool` in one folder. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "usage.spool"
        self.records = 0
        """Records that wait for the database."""
        self.torn = 0
        """Lines of the last reading that a crash had cut off."""

    def append(self, records: Sequence[UsageRecord]) -> None:
        """Keep `records` durably. Raises `OSError` if the file cannot be written; then none of them counts as kept."""
        data = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        fresh = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                data = b"\n" + data  # a crash cut the last line; ours start on their own
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)  # a full disk must not leave half a line behind
                raise
        finally:
            os.close(descriptor)
        if fresh:
            self._sync_folder()
        self.records += len(records)

    def read(self, size: int = 500) -> Iterator[list[UsageRecord]]:
        """Everything that is kept, in parts of `size`."""
        self.torn = 0
        part: list[UsageRecord] = []
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self.records = 0
            return
        with file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    part.append(_decoder.decode(line))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    self.torn += 1
                    continue
                if len(part) >= size:
                    yield part
                    part = []
        if part:
            yield part

    def count(self) -> int:
        """Count what a former process has left behind."""
        self.records = sum(len(part) for part in self.read())
        return self.records

    def clear(self) -> None:
        """Forget everything; call it only when the database has committed it."""
        if self.path.exists():
            self.path.unlink()
            self._sync_folder()
        self.records = 0

    def _sync_folder(self) -> None:
        descriptor = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
