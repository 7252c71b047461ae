"""What every call under way holds and has used so far, in a memory-mapped file that outlives this process.

A slot is written when a call is admitted, its running usage in place whenever the engine has said something new, and it
is freed when the call's record is durable. Writing is a copy into memory: no system call, no other thread, no wait. The
pages belong to the kernel, so that `kill -9` takes nothing from them; the loss of power may.

A writer that dies in the middle of a slot cannot be misread: the number that makes a slot live is written last and goes
into the checksum of what it holds, and the usage is written in turn to one of two places, each with a checksum, of
which the reader takes the newer whole one.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.call import Usage

_FILE_MAGIC = b"GWCALLS\0"
VERSION = 1
_HEADER = struct.Struct("<8sII")  # magic, version, bytes of a slot
_HEADER_BYTES = 4096  # slots begin on a page
SLOT_BYTES = 2048
_LIVE = struct.Struct("<Q")  # 0 = free, else the number of the call
_HEAD = struct.Struct("<II80x")  # length and checksum of `Held`, then two empty places for usage
_USAGE = struct.Struct("<5Q")  # sequence, prompt, completion, cached, checksum
_USAGE_AT = _LIVE.size + 8
_HELD_AT = _LIVE.size + _HEAD.size
_ROOM = SLOT_BYTES - _HELD_AT
_FIRST_SLOTS = 256
MOST_SLOTS = 65_536
_MODEL_CHARACTERS = 200  # as many of an engine's model name as a slot has room for
_MASK = (1 << 64) - 1


class JournalFull(Exception):
    """There is no room for one more call."""


class Held(msgspec.Struct, array_like=True, frozen=True):
    """What is known of a call when it is admitted: everything that its record needs if this process dies.

    `started_at` is Unix seconds, `tokens` what it holds of the day `day`.
    """

    request_id: str
    key_id: str
    organisation: str | None
    model: str
    endpoint: str
    tokens: int
    day: str
    stream: bool
    started_at: float
    trace_id: str | None


class Left(msgspec.Struct, frozen=True):
    """A call that a dead process has left behind, with the usage it knew last."""

    held: Held
    prompt: int
    completion: int
    cached: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Held).decode


class Slot:
    """One call's place. `note` belongs to the event loop; `free` may be called by any thread, once."""

    __slots__ = ("_at", "_free", "_known", "_map", "_number", "_sequence", "held", "row")

    def __init__(self, file: mmap.mmap, at: int, number: int, held: Held, free: Callable[[int], None]) -> None:
        self._map = file
        self._at = at
        self._number = number
        self._sequence = 0
        self._known = 0
        self._free = free
        self.held = held
        self.row = False
        """Whether the database was told of this call, too."""

    def note(self, usage: Usage) -> None:
        """Keep what the call has used so far."""
        prompt = usage.prompt
        completion = usage.completion
        if prompt + completion == self._known:
            return
        cached = usage.cached
        sequence = self._sequence = self._sequence + 1
        check = (self._number + 3 * sequence + 5 * prompt + 7 * completion + 11 * cached) & _MASK
        try:
            _USAGE.pack_into(
                self._map, self._at + _USAGE_AT + (sequence & 1) * 40, sequence, prompt, completion, cached, check
            )
        except struct.error:
            self._sequence -= 1  # a number that no engine can mean; what was known before is in the other place
            return
        self._known = prompt + completion

    def free(self) -> None:
        """The record is durable: the place is anybody's."""
        _LIVE.pack_into(self._map, self._at, 0)
        self._free(self._at)


class Journal:
    """The file. `open` is called before the first `take`; a file that another process has open is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._map: mmap.mmap | None = None
        self._free: list[int] = []
        self._slots = 0
        self._number = 0
        self.problem: str | None = None
        """What was wrong with the file that `open` found."""

    # The start

    def open(self) -> list[Left]:
        """Read what a dead process has left. Raises `OSError`; `BlockingIOError` when another process has the file.

        The file stays as it is until `begin`, so that a start that dies in between may be repeated.
        """
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.fstat(self._file).st_size
        if not size:
            return []
        if size > _HEADER_BYTES + MOST_SLOTS * SLOT_BYTES:
            self.problem = f"it has {size} bytes"
            return []
        left, self.problem = read(os.pread(self._file, size, 0))
        return left

    def begin(self) -> str | None:
        """Forget what `open` read, which is settled now, and begin to keep calls.

        A file that could not be read whole is set aside; returns its new name. Raises `OSError`.
        """
        aside = None
        if self.problem is not None:
            aside = self._set_aside()
        assert self._file is not None
        size = os.fstat(self._file).st_size
        slots = max(_FIRST_SLOTS, (size - _HEADER_BYTES) // SLOT_BYTES)
        # Blocks are taken now: a full disk must not be met by a write into memory, which would kill the process.
        os.posix_fallocate(self._file, 0, _HEADER_BYTES + slots * SLOT_BYTES)
        os.ftruncate(self._file, _HEADER_BYTES + slots * SLOT_BYTES)
        self._map = mmap.mmap(self._file, _HEADER_BYTES + slots * SLOT_BYTES)
        for at in range(_HEADER_BYTES, len(self._map), SLOT_BYTES):
            if _LIVE.unpack_from(self._map, at)[0]:
                _LIVE.pack_into(self._map, at, 0)
        _HEADER.pack_into(self._map, 0, _FILE_MAGIC, VERSION, SLOT_BYTES)
        self._slots = slots
        self._number = time.time_ns()  # larger than in any life before: no checksum of then is one of now
        self._free = list(range(_HEADER_BYTES + (slots - 1) * SLOT_BYTES, _HEADER_BYTES - 1, -SLOT_BYTES))
        return aside

    def _set_aside(self) -> str:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        target = self.path.with_name(f"{self.path.name}.damaged-{stamp}")
        self.path.rename(target)
        assert self._file is not None
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return target.name

    def close(self) -> None:
        """Give the file up; what is live in it stays for the next start."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # Calls

    def take(self, held: Held) -> Slot:
        """A place for one call, kept from now on. Raises `JournalFull`."""
        data = _encode(held)
        if len(data) > _ROOM:
            data = _encode(msgspec.structs.replace(held, model=held.model[:_MODEL_CHARACTERS]))
            if len(data) > _ROOM:
                raise JournalFull("the names of this call are too long")
        free = self._free
        if not free:
            self._grow()
        file = self._map
        assert file is not None
        at = free.pop()
        number = self._number = self._number + 1
        head = _HEAD.pack(len(data), zlib.crc32(data, number & 0xFFFF_FFFF))
        file[at + _LIVE.size : at + _HELD_AT + len(data)] = head + data
        _LIVE.pack_into(file, at, number)
        return Slot(file, at, number, held, free.append)

    def _grow(self) -> None:
        assert self._map is not None
        assert self._file is not None
        slots = min(2 * self._slots, MOST_SLOTS)
        if slots == self._slots:
            raise JournalFull(f"{slots} calls are under way or wait for the database")
        size = _HEADER_BYTES + slots * SLOT_BYTES
        try:
            os.posix_fallocate(self._file, 0, size)
            self._map.resize(size)
        except OSError as error:
            raise JournalFull(str(error)) from error
        first = _HEADER_BYTES + self._slots * SLOT_BYTES
        self._free.extend(range(size - SLOT_BYTES, first - 1, -SLOT_BYTES))
        self._slots = slots


def read(data: bytes) -> tuple[list[Left], str | None]:
    """The live calls in a journal's bytes, and what cannot be read of it (None: all can)."""
    if len(data) < _HEADER_BYTES:
        return [], "it is too short" if data.strip(b"\0") else None
    magic, version, slot_bytes = _HEADER.unpack_from(data)
    if magic != _FILE_MAGIC:
        # A process that died while it made the file leaves zeros.
        return [], "it is no journal" if data.strip(b"\0") else None
    if (version, slot_bytes) != (VERSION, SLOT_BYTES):
        return [], f"it has the form {version} with slots of {slot_bytes} bytes"
    left: list[Left] = []
    damaged = 0
    for at in range(_HEADER_BYTES, len(data) - SLOT_BYTES + 1, SLOT_BYTES):
        (number,) = _LIVE.unpack_from(data, at)
        if not number:
            continue
        call = _slot(data[at : at + SLOT_BYTES], number)
        if call is None:
            damaged += 1
        else:
            left.append(call)
    problem = None
    if damaged:
        problem = f"{damaged} of its calls cannot be read"
    elif (len(data) - _HEADER_BYTES) % SLOT_BYTES:
        problem = "it was cut off"
    return left, problem


def _slot(data: bytes, number: int) -> Left | None:
    length, check = struct.unpack_from("<II", data, _LIVE.size)
    text = data[_HELD_AT : _HELD_AT + length]
    if len(text) != length or zlib.crc32(text, number & 0xFFFF_FFFF) != check:
        return None
    try:
        held = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    newest: Sequence[int] = (0, 0, 0, 0)
    for place in (0, 1):
        sequence, prompt, completion, cached, total = _USAGE.unpack_from(data, _USAGE_AT + place * 40)
        whole = total == (number + 3 * sequence + 5 * prompt + 7 * completion + 11 * cached) & _MASK
        if whole and sequence > newest[0]:
            newest = (sequence, prompt, completion, cached)
    return Left(held, *newest[1:])
