"""Joules by key: the GPUs' energy counter, divided over the calls that ran.

Between two readings of the exporter the energy that was used is shared among the calls by the tokens that they moved in
that time (prompt tokens when they were computed, completion tokens as they came); when none moved a token it is shared
evenly among those in the engine, and when none was there it is `idle`. Shares and idle add up to the counter's growth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.call import Call

PERIOD_SECONDS = 1.0


class _Reading(msgspec.Struct):
    joules_total: float


class Meter:
    """Shares energy. `read` fetches the exporter's JSON, `calls` are those under way, `record` keeps joules by key."""

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        calls: Callable[[], Iterable[Call]],
        record: Callable[[dict[str, float]], None],
        count: Callable[[str, float], None],
    ) -> None:
        self._read = read
        self._calls = calls
        self._record = record
        self._count = count
        self._last: float | None = None
        self._seen: dict[str, int] = {}  # tokens of running calls at the last reading
        self._ended: list[tuple[str, int]] = []  # key and tokens moved since then by calls that have ended

    def note(self, call: Call) -> None:
        """A call has ended: its last tokens still count."""
        if self._last is not None and call.caller is not None and call.backend is not None:
            self._ended.append((call.caller.key_id, call.usage.total - self._seen.pop(call.request_id, 0)))

    async def run(self) -> None:
        """Read and share for ever. A missing exporter, or one without GPUs, measures nothing."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                total = msgspec.json.decode(await self._read(), type=_Reading).joules_total
            except (UpstreamError, msgspec.DecodeError):
                self._last = None  # a gap is not shared: nobody knows who ran in it
                self._seen.clear()
                self._ended.clear()
                continue
            self.share(total)

    def share(self, total: float) -> None:
        """Divide the growth since the last reading; `total` is the counter in joules."""
        last, self._last = self._last, total
        moved = [(key_id, tokens) for key_id, tokens in self._ended if tokens > 0]
        present = [key_id for key_id, _ in self._ended]
        self._ended.clear()
        seen: dict[str, int] = {}
        for call in self._calls():
            if call.stage != "forward" or call.caller is None:
                continue
            seen[call.request_id] = call.usage.total
            present.append(call.caller.key_id)
            if (tokens := call.usage.total - self._seen.get(call.request_id, 0)) > 0:
                moved.append((call.caller.key_id, tokens))
        self._seen = seen
        if last is None or total <= last:
            return  # the first reading, or the counter began anew
        used = total - last
        if not present:
            self._count("idle", used)
            return
        shares: dict[str, float] = {}
        weights: list[tuple[str, Any]] = moved or [(key_id, 1) for key_id in present]
        whole = sum(weight for _, weight in weights)
        for key_id, weight in weights:
            shares[key_id] = shares.get(key_id, 0.0) + used * weight / whole
        self._count("calls", used)
        self._record(shares)
