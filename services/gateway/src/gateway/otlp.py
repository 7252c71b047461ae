"""Spans as OTLP's bytes (protobuf).

The SDK's encoder makes some fifteen objects of each span: 25 µs, in a thread that takes Python's lock from the event
loop for as long. This is a format string. A test compares the two, field by field.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

Value = str | bool | int | float
SERVER, INTERNAL, CLIENT = 2, 1, 3  # Span.SpanKind
_LEAST, _MOST = -(2**63), 2**63 - 1  # what an attribute can hold; callers write any number
_IDS = struct.Struct(">2sQQ2sQ")  # trace id and span id, each behind its tag and length
_TIMES = struct.Struct("<cQcQ")
# The last field: that it is known whether the parent is remote, and whether it is.
_LOCAL, _REMOTE = (b"\x85\x01" + struct.pack("<I", flags) for flags in (0x100, 0x300))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A string, bytes or a message as field `number` (at most 15)."""
    size = len(payload)
    return (
        bytes((number << 3 | 2, size)) + payload if size < 128 else bytes((number << 3 | 2,)) + _varint(size) + payload
    )


def attributes(number: int, values: Mapping[str, Value]) -> bytes:
    """Key and value pairs, each of them one more field `number`."""
    parts = []
    for name, value in values.items():
        if isinstance(value, str):
            encoded = field(1, value.encode(errors="replace"))
        elif isinstance(value, bool):
            encoded = b"\x10\x01" if value else b"\x10\x00"
        elif isinstance(value, int):
            encoded = b"\x18" + _varint(max(_LEAST, min(value, _MOST)) & 0xFFFF_FFFF_FFFF_FFFF)
        else:
            encoded = b"\x21" + struct.pack("<d", value)
        parts.append(field(number, field(1, name.encode()) + field(2, encoded)))
    return b"".join(parts)


def status(error: str | None) -> bytes:
    """A span's status: nothing said, or a failure by its code."""
    return field(15, b"" if error is None else (field(2, error.encode()) if error else b"") + b"\x18\x02")


def span(
    trace_id: int,
    span_id: int,
    parent_id: int | None,
    name: bytes,
    kind: int,
    start: int,
    end: int,
    told: bytes = b"",
    *,
    remote: bool = False,
) -> bytes:
    """One span of a scope. `told` are its attributes (field 9) and status; times are Unix nanoseconds."""
    ids = _IDS.pack(b"\x0a\x10", trace_id >> 64, trace_id & 0xFFFF_FFFF_FFFF_FFFF, b"\x12\x08", span_id)
    parent = b"" if parent_id is None else b'"\x08' + parent_id.to_bytes(8, "big")
    times = _TIMES.pack(b"\x39", start, b"\x41", end)
    tail = _REMOTE if remote else _LOCAL
    return field(
        2, b"%b%b%b%b%b%b%b" % (ids, parent, field(5, name), bytes((0x30, kind)), times, told or status(None), tail)
    )


def request(resource: bytes, spans: bytes) -> bytes:
    """What a collector is sent: `spans` of one scope without a name, made by `resource` (its attributes as field 1)."""
    return field(1, field(1, resource) + field(2, b"\x0a\x00" + spans))
