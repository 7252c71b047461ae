"""The decoder of chunked bodies against h11, for valid bodies, broken ones and every cut of them."""

from __future__ import annotations

import itertools

import h11
from hypothesis import given
from hypothesis import strategies as st

from gateway.chunked import Chunked
from gateway.head import Refused

CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


def encoded(chunks: list[bytes], upper: bool, extension: bytes, trailers: bytes) -> bytes:
    form = b"%X%b\r\n%b\r\n" if upper else b"%x%b\r\n%b\r\n"
    return b"".join(form % (len(c), extension, c) for c in chunks) + b"0" + extension + b"\r\n" + trailers + b"\r\n"


def decoded(pieces: list[bytes]) -> tuple[bytes, bool, bytes] | None:
    """The body, whether it is complete, and what followed it; None if it was refused."""
    decoder = Chunked()
    body, rest = b"", b""
    try:
        for piece in pieces:
            if decoder.done:
                rest += piece
            else:
                body += b"".join(decoder.feed(piece))
                rest = decoder.rest
    except Refused:
        return None
    return body, decoder.done, rest


def h11_body(data: bytes) -> bytes | None:
    """What h11 reads from a complete body; None if it refuses it or wants more."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
    body = b""
    try:
        while True:
            event = server.next_event()
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return body
            elif event is h11.NEED_DATA:
                return None
    except h11.RemoteProtocolError:
        return None


@given(
    chunks=CHUNKS,
    upper=st.booleans(),
    extension=st.sampled_from([b"", b";a", b";a=b", b';a="b;c"']),
    trailers=st.sampled_from([b"", b"A: b\r\n", b"A: b\r\nC:\r\n"]),
    rest=st.binary(max_size=10),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_valid_bodies(
    chunks: list[bytes], upper: bool, extension: bytes, trailers: bytes, rest: bytes, cuts: list[int]
) -> None:
    data = encoded(chunks, upper, extension, trailers) + rest
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    assert decoded(pieces) == (b"".join(chunks), True, rest)
    assert h11_body(data) == b"".join(chunks)


@given(chunks=CHUNKS, at=st.integers(0, 300), put=st.binary(min_size=1, max_size=3), instead=st.booleans())
def test_damaged_bodies_are_never_read_otherwise_than_by_h11(
    chunks: list[bytes], at: int, put: bytes, instead: bool
) -> None:
    """Stricter is allowed; another body is a way to smuggle."""
    data = encoded(chunks, False, b"", b"")
    at = min(at, len(data))
    data = data[:at] + put + data[at + (len(put) if instead else 0) :]
    found = decoded([data])
    if found is not None and found[1]:
        assert h11_body(data) == found[0]


@given(chunks=CHUNKS, at=st.integers(0, 300), put=st.binary(min_size=1, max_size=3), cuts=st.lists(st.integers(0, 300)))
def test_cuts_do_not_matter(chunks: list[bytes], at: int, put: bytes, cuts: list[int]) -> None:
    data = encoded(chunks, False, b"", b"")
    data = data[:at] + put + data[at:]
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    whole, cut = decoded([data]), decoded(pieces)
    if whole is None or cut is None:
        assert whole == cut
    else:
        assert whole == cut


def test_unfinished_lines_are_bounded() -> None:
    decoder = Chunked()
    taken = 0
    try:
        for _ in range(10_000):
            decoder.feed(b"1" if taken < 5 else b" ")
            taken += 1
    except Refused:
        assert taken < 2_000
        return
    raise AssertionError("an endless line was kept")
