"""Large bodies: long plain stretches, such as an image in base64, are set aside before a body is parsed.

Parsing 20 MB in one go holds Python's lock for 40 to 130 ms, and every stream waits, also when a thread does it. So
what makes a body large is searched piece by piece, replaced by a short placeholder, and put back, without being copied,
into what goes to the engine. Parsed, checked and built anew is only the rest.

This is exact. A stretch holds only printable ASCII without quotes and backslashes, and `\\/` as some clients write a
slash, so it begins and ends nothing and needs no check of its own. Whether it lies inside a string is not known while
it is found, and need not be: each one has a byte that JSON allows nowhere else. Placeholders are letters as well, so
the rest is valid exactly when the whole is. They cannot be guessed by a caller.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING

from gateway import wire
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    import msgspec

    from gateway.wire import Caps, Endpoint, Request

STRETCH_BYTES = 65_536  # a body is probed this far apart; what is found may be cut from twice this length on
SLICE_BYTES = 131_072  # looked at before other work has its turn: a quarter of a millisecond
# A stretch is cut this far behind where it was found: an escape that began before it has ended, and the first 256
# characters of a text, by which media are judged, stay.
LEAD_BYTES = 600
EVIDENCE_BYTES = 4_096
_PLAIN = re.compile(rb"(?:[ !#-\[\]-~]++|\\/)*+")
_ONLY_IN_STRINGS = re.compile(rb"[^-+0-9.,:\[\]{} Etrufalsen]")
Buffer = bytes | memoryview


class Aside:
    """What was set aside of one body. `rest` is the body with placeholders; the stretches stay where they are."""

    __slots__ = ("_mark", "_mark_text", "_stretches", "rest")

    def __init__(self, raw: bytes, cuts: list[tuple[int, int]]) -> None:
        name = f"~{secrets.token_hex(16)}~"
        self._mark = re.compile(f"{name}([0-9]+)~".encode())
        self._mark_text = re.compile(f"{name}([0-9]+)~")
        view = memoryview(raw)
        self._stretches = [view[begin:end] for begin, end in cuts]
        parts = []
        at = 0
        for number, (begin, end) in enumerate(cuts):
            parts += [raw[at:begin], f"{name}{number}~".encode()]
            at = end
        self.rest = b"".join([*parts, raw[at:]])

    def restore(self, data: bytes) -> list[Buffer]:
        """`data` with its stretches in their places, in pieces that belong behind one another."""
        pieces = self._mark.split(data)
        pieces[1::2] = [self._stretches[int(number)] for number in pieces[1::2]]
        return pieces

    def beginning(self, data: memoryview, size: int) -> bytes:
        """The first `size` bytes of `data` as they were."""
        # A placeholder may stand across the border, but none is longer than this.
        return b"".join(bytes(piece[:size]) for piece in self.restore(bytes(data[: size + 64])))[:size]

    def size(self, data: msgspec.Raw) -> int:
        """The bytes that a field had."""
        return sum(map(len, self.restore(bytes(memoryview(data)))))

    def characters(self, text: str) -> int:
        """The bytes that a decoded text had before it was set aside; a written `\\/` counts as two."""
        found = self._mark_text.finditer(text)
        return len(text) + sum(len(self._stretches[int(mark[1])]) - len(mark[0]) for mark in found)

    def touches(self, text: str) -> bool:
        """Whether something of `text` was set aside."""
        return self._mark_text.search(text) is not None


async def find(raw: bytes, stretch: int = STRETCH_BYTES, piece: int = SLICE_BYTES) -> list[tuple[int, int]]:
    """Where the long plain stretches lie: (begin, end), in order. Lets other tasks run every `piece` bytes.

    Stretches of twice `stretch` are found for certain, shorter ones than `stretch` never.
    """
    cuts = []
    at = work = 0
    while at < len(raw):
        end = at
        while (stop := _PLAIN.match(raw, end, end + piece).end()) > end:  # type: ignore[union-attr]  # may be empty
            work += stop - end + 64
            end = stop
            if work >= piece:
                work = 0
                await asyncio.sleep(0)
        work += 64
        begin = at + LEAD_BYTES
        if end - at >= stretch and end - begin > 0:
            begin += raw[begin - 1] == 0x5C  # not between a backslash and its slash
            if _ONLY_IN_STRINGS.search(raw, begin, min(end, begin + EVIDENCE_BYTES)):
                cuts.append((begin, end))
        at = max(end, at + stretch)
    return cuts


class LargeBodies:
    """Parses large bodies, one after another, so that several at once cost other calls no more than one."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def parse(self, endpoint: Endpoint, raw: bytes, caps: Caps) -> Request:
        """As `wire.parse`, without holding up other tasks where long stretches make the body large.

        A body that is large by its structure is parsed in a thread, which helps less. Raises `InvalidRequest`, also
        for a field whose name is so long that it was set aside.
        """
        async with self._turn:
            cuts = await find(raw)
            if not cuts:
                return await asyncio.to_thread(wire.parse, endpoint, raw, caps)
            aside = Aside(raw, cuts)
            if len(aside.rest) > wire.LARGE_BYTES:
                request = await asyncio.to_thread(wire.parse, endpoint, raw, caps, aside)
            else:
                request = wire.parse(endpoint, raw, caps, aside)
        if any(aside.touches(name) for name in request.fields):
            raise InvalidRequest("A field's name is too long.")
        return request
