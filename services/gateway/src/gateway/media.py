"""Media inside a request: how many items, how many bytes, and that none is to be fetched from somewhere else.

A remote URL would let a caller choose what the engine connects to, so only `data:` URLs pass unless REMOTE_MEDIA is on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from gateway.errors import InvalidRequest

Raw = msgspec.Raw

# Keys of a content part that carry or name media, over the three dialects and vLLM's own shorthands.
MEDIA_KEYS = frozenset(
    ("image_url", "video_url", "audio_url", "input_audio", "image_embeds", "audio_embeds", "image", "video", "audio",
     "image_pil", "file", "file_url", "file_data", "file_id", "source")
)  # fmt: skip
_MARKS = re.compile(b'"(?:' + "|".join(sorted(MEDIA_KEYS)).encode() + b')"')
_PLACES = (
    "messages", "input", "system", "documents", "items", "query", "data_1", "data_2", "text_1", "text_2", "queries",
)  # fmt: skip


def media_in(raw: bytes, fields: dict[str, Raw], remote: bool, length: Callable[[str], int] = len) -> tuple[int, int]:
    """Items and bytes of media in a body. Raises `InvalidRequest` for a remote URL unless `remote`.

    `length` says how long a text was, where a part of it was set aside.
    """
    # An escaped key ("\\u0069mage_url") is spelled with a backslash, so its presence forces the full look.
    if _MARKS.search(raw) is None and b"\\u00" not in raw:
        return 0, 0
    count = size = 0
    for name in _PLACES:
        place = fields.get(name)
        if place is not None and bytes(memoryview(place)[:1]) in (b"[", b"{"):
            items, octets = _walk(_decoded(place, name), name, remote, length, 0)
            count += items
            size += octets
    return count, size


_any = msgspec.json.Decoder()


def _decoded(place: Raw, name: str) -> Any:
    """The value of a field. What was checked so far is its form, not the bytes of its texts."""
    try:
        return _any.decode(place)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(f"'{name}' is not valid JSON.", param=name) from None


def _walk(value: Any, param: str, remote: bool, length: Callable[[str], int], depth: int) -> tuple[int, int]:
    if depth > 32:
        raise InvalidRequest(f"'{param}' is nested too deeply.", param=param)
    count = size = 0
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict | list):
                items, octets = _walk(item, param, remote, length, depth + 1)
                count, size = count + items, size + octets
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in MEDIA_KEYS and item is not None:
                count, size = count + 1, size + _check(item, param, remote, length, depth)
            elif isinstance(item, dict | list):
                items, octets = _walk(item, param, remote, length, depth + 1)
                count, size = count + items, size + octets
    return count, size


def _check(value: Any, param: str, remote: bool, length: Callable[[str], int], depth: int) -> int:
    """Bytes of one media value, after refusing every string in it that names a place instead of carrying data."""
    if depth > 32:
        raise InvalidRequest(f"'{param}' is nested too deeply.", param=param)
    if isinstance(value, str):
        head = value[:256].lstrip().lower()
        scheme = head.partition(":")[0]
        if not remote and head[:5] != "data:" and ((scheme.isalpha() and ":" in head) or head[:2] in ("//", "\\\\")):
            raise InvalidRequest(
                "Media must be sent inline as a data: URL; this service fetches nothing from elsewhere.", param=param
            )
        return length(value)
    if isinstance(value, dict):
        return sum(_check(item, param, remote, length, depth + 1) for item in value.values())
    if isinstance(value, list):
        return sum(_check(item, param, remote, length, depth + 1) for item in value)
    return 0
