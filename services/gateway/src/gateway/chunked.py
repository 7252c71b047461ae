"""A strict decoder of chunked request bodies that knows exactly where the body ends.

httptools does not say at which byte a message ended, which is needed to keep pipelined requests in order, so the
framing of chunks is read here: hexadecimal size, CRLF everywhere, bounded extensions, trailers checked and dropped.
Whatever is not exactly that ends the connection, because a second reader of these bytes might see another body.
"""

from __future__ import annotations

import re

from gateway.head import Refused

LINE_BYTES = 1_024  # a size line with its extensions
TRAILER_BYTES = 8_192
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})(?:;[\t\x20-\x7e\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")


class Chunked:
    """Feed bytes, get the body's bytes; `done` when the final chunk's empty line has been read."""

    __slots__ = ("_left", "_line", "_trailer", "done", "rest")

    def __init__(self) -> None:
        self._left = -1  # data bytes of the chunk still to come; 0: its CRLF; -1: a size line; -2: trailers
        self._line = b""  # an unfinished line
        self._trailer = 0  # bytes of trailers so far
        self.done = False
        self.rest = b""  # what followed the body

    def feed(self, data: bytes) -> list[bytes]:
        """Decode `data` and return the body's pieces in it. Raises `Refused`."""
        pieces: list[bytes] = []
        data = self._line + data
        self._line = b""
        at = 0
        while not self.done:
            if self._left > 0:
                piece = data[at : at + self._left]
                if not piece:
                    return pieces
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            line, at = self._take_line(data, at)
            if line is None:
                return pieces
            self._read_line(line)
        self.rest = data[at:]
        return pieces

    def _take_line(self, data: bytes, at: int) -> tuple[bytes | None, int]:
        end = data.find(b"\n", at)
        limit = 0 if self._left == 0 else LINE_BYTES
        if end < 0:
            self._line = data[at:]
            if len(self._line) > limit + 1 or (limit == 0 and self._line not in (b"", b"\r")):
                raise Refused(400, "Malformed chunked body.")
            return None, at
        line = data[at:end]
        if line[-1:] != b"\r" or len(line) > limit + 1:
            raise Refused(400, "Malformed chunked body.")
        return line[:-1], end + 1

    def _read_line(self, line: bytes) -> None:
        if self._left == 0:  # after a chunk's data; `_take_line` has let nothing but the empty line through
            self._left = -1
        elif self._left == -1:
            match = _SIZE.fullmatch(line)
            if match is None:
                raise Refused(400, "Malformed chunk size.")
            self._left = int(match[1], 16) or -2
        elif not line:
            self.done = True
        else:
            self._trailer += len(line)
            if self._trailer > TRAILER_BYTES or _TRAILER.fullmatch(line) is None:
                raise Refused(400, "Malformed trailers.")
