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
    ("image_url", "video_url", "audio_url", "input_audio", "image_embeds", "audio_embeds", "video_embeds", "image",
     "video", "audio", "image_pil", "file", "file_url", "file_data", "file_id", "source")
)  # fmt: skip
_MARKS = re.compile(b'"(?:' + "|".join(sorted(MEDIA_KEYS)).encode() + b')"')
# What an engine reads as text, or as a schema, whatever stands in it. Every other field is looked through, so that a
# new one is no way around.
TEXT_FIELDS = frozenset(
    ("tools", "tool_choice", "functions", "function_call", "response_format", "structured_outputs", "guided_json",
     "text", "output_config", "metadata")
)  # fmt: skip
_TEXT_INSIDE = frozenset(("tools", "tool_calls", "input_schema"))  # the same inside of a message
_ANTHROPIC = ("messages", "count_tokens")
_ELSEWHERE = re.compile(r"[\0-\x20]*(?:[a-z][a-z0-9+.-]*:|\\\\)", re.IGNORECASE)
_NO_SCHEME = re.compile(r"[\0-\x20]*//")


def media_in(
    raw: bytes, fields: dict[str, Raw], remote: bool, length: Callable[[str], int] = len, endpoint: str = ""
) -> tuple[int, int]:
    """Items and bytes of media in a body. Raises `InvalidRequest` for a remote URL unless `remote`.

    `length` says how long a text was, where a part of it was set aside; `endpoint` is the route's name.
    """
    # An escaped key ("\\u0069mage_url") is spelled with a backslash, so its presence forces the full look.
    if _MARKS.search(raw) is None and b"\\u00" not in raw:
        return 0, 0
    count = size = 0
    look = _Look(remote, length, endpoint in _ANTHROPIC)
    for name, place in fields.items():
        if name in TEXT_FIELDS or (name == "documents" and endpoint == "chat_completions"):
            continue
        begins = bytes(memoryview(place)[:1])
        if begins in (b"[", b"{") or (begins == b'"' and name in MEDIA_KEYS):
            look.param = name
            items, octets = look.walk({name: _decoded(place, name)}, -1)
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


class _Look:
    """One look through a body's fields; `param` is the one under it."""

    def __init__(self, remote: bool, length: Callable[[str], int], anthropic: bool) -> None:
        self._remote = remote
        self._length = length
        self._anthropic = anthropic
        self.param = ""

    def walk(self, value: Any, depth: int) -> tuple[int, int]:
        """Items and bytes of media in `value`."""
        self._bound(depth)
        count = size = 0
        if isinstance(value, list):
            for item in value:
                if isinstance(item, dict | list):
                    items, octets = self.walk(item, depth + 1)
                    count, size = count + items, size + octets
        elif isinstance(value, dict):
            # What a model gave a tool is text for the engine: `file` and `source` are arguments there, not media.
            arguments = self._anthropic and value.get("type") == "tool_use"
            for key, item in value.items():
                if key in MEDIA_KEYS and item is not None:
                    count, size = count + 1, size + self._check(item, depth)
                elif isinstance(item, dict | list) and key not in _TEXT_INSIDE and not (arguments and key == "input"):
                    items, octets = self.walk(item, depth + 1)
                    count, size = count + items, size + octets
        return count, size

    def _check(self, value: Any, depth: int, data: bool = False) -> int:
        """Bytes of one media value, after refusing every string in it that names a place instead of carrying data."""
        self._bound(depth)
        if isinstance(value, str):
            head = value[:256]
            # Base64 may begin with two slashes: as `data` an engine never takes it for a place.
            named = _ELSEWHERE.match(head) or (not data and _NO_SCHEME.match(head))
            if named and not self._remote and head.lstrip()[:5].lower() != "data:":
                raise InvalidRequest(
                    "Media must be sent inline as a data: URL; this service fetches nothing from elsewhere.",
                    param=self.param,
                )
            return self._length(value)
        if isinstance(value, dict):
            return sum(self._check(item, depth + 1, key == "data") for key, item in value.items())
        if isinstance(value, list):
            return sum(self._check(item, depth + 1, data) for item in value)
        return 0

    def _bound(self, depth: int) -> None:
        if depth > 32:
            raise InvalidRequest(f"'{self.param}' is nested too deeply.", param=self.param)
