"""Rerank and score, without I/O: an engine reads, and counts, the query once for every document.

So it does whatever else stands beside the documents: an instruction, the score template's arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.media import media_in

if TYPE_CHECKING:
    from collections.abc import Callable

Raw = msgspec.Raw

_READ_ONCE = frozenset(("documents", "items", "text_2", "data_2"))
_QUERIES = frozenset(("queries", "text_1", "data_1"))  # where several stand, each has a document of its own
_items = msgspec.json.Decoder(list[Raw])


def repeated(
    fields: dict[str, Raw], size: Callable[[Raw], int], remote_media: bool, length: Callable[[str], int]
) -> tuple[int, int]:
    """Bytes of text, and media items, that belong to every pair of a body with these fields.

    `size` says how long a field was, `length` how long a text was, where a part of it was set aside.
    """
    octets = media = 0
    for name, value in fields.items():
        if name in _READ_ONCE:
            continue
        raw = bytes(memoryview(value))
        if name in _QUERIES and raw[:1] == b"[" and len(_items.decode(value)) > 1:
            continue
        items, media_bytes = media_in(raw, {name: value}, remote_media, length)
        octets += len(name) + size(value) - media_bytes
        media += items
    return octets, media
