"""How a test tells the vLLM double what to do: `key=value` pairs, found in a request or set by a control call.

A directive is `double:key=value,key=value` (or `fault:…`, the same) anywhere in the request's body, so it passes any
gateway; or the header `x-double`; or the next one queued by `POST /double/fault`.

| key | meaning |
|---|---|
| `tokens=N` | generate N tokens a choice (then `stop`), unless the request's limit is lower (`length`) |
| `pace_ms=X` `prefill_ms=X` `gap_ms=X` | time between tokens, before the first event, between role and first token |
| `words=tricky` `token_bytes=N` | tokens that look like framing; tokens of N bytes |
| `status=N` | answer with this status; 5xx carry `SECRET`, 4xx look like vLLM's |
| `die=headers` `die_after=K` | close before the headers; after K events of a stream (K bytes of a JSON body) |
| `how=rst|fin|clean` | how: reset, FIN without the last chunk (default), or a proper end of the HTTP body |
| `hang=headers` `hang_after=K` | keep silent until the client leaves |
| `wait_after=K` | after K events of a stream, wait for a `POST /double/go` |
| `error_after=K` | the engine fails: vLLM's error event, then (chat, completions) `[DONE]` |
| `done=no` | a clean HTTP end without the terminal event |
| `garbage=headers` `garbage_after=K` | bytes that are no HTTP; bytes that are no SSE |
| `json=broken` | HTTP in order, body cut in the middle with a matching length |
| `split=N` `coalesce=K` | write N bytes at a time; K events in one write |
| `usage=none|wrong` | report no usage; report a million tokens |
| `leak=1` | answer with headers that must not reach a caller |
| `close=1` | `connection: close` on the answer |
"""

from __future__ import annotations

import re

SECRET = "SECRET-0xdeadbeef /usr/lib/engine/worker.py: KV cache of tenant 7"
_PATTERN = re.compile(rb"(?:double|fault):([a-z_]+=[A-Za-z0-9_.]+(?:,[a-z_]+=[A-Za-z0-9_.]+)*)")
KEYS = frozenset(re.findall(r"`([a-z_]+)=", __doc__ or ""))  # the table above is the list


class Directive:
    """The pairs that hold for one request; a missing number is None."""

    def __init__(self, text: str = "") -> None:
        self.text = text
        self._values: dict[str, str] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            if key not in KEYS:
                raise ValueError(f"unknown directive {key!r}")
            self._values[key] = value

    @classmethod
    def find(cls, body: bytes, header: str | None = None) -> Directive | None:
        """The directive of a request, or None. Raises ValueError for an unknown key."""
        if header:
            return cls(header)
        match = _PATTERN.search(body)
        return cls(match[1].decode()) if match else None

    def get(self, key: str) -> str | None:
        """The value of `key`."""
        return self._values.get(key)

    def number(self, key: str) -> float | None:
        """The value of `key` as a number."""
        value = self._values.get(key)
        return None if value is None else float(value)

    def count(self, key: str) -> int | None:
        """The value of `key` as a whole number."""
        value = self.number(key)
        return None if value is None else int(value)

    def says(self, key: str, value: str) -> bool:
        """Whether `key` has exactly this value."""
        return self._values.get(key) == value
