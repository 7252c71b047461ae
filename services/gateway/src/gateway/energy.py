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
    """The exporter's `/energy`: joules of each GPU since its driver was loaded."""

    gpus: dict[str, float]
    timestamp: float  # Unix seconds of the sample; the exporter samples less often than it is asked


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
        self._counters: dict[str, float] = {}
        self._sampled_at = 0.0
        self._seen: dict[str, int] = {}  # tokens of running calls at the last reading
        self._ended: list[tuple[str, int]] = []  # key and tokens moved since then by calls that have ended

    def note(self, call: Call) -> None:
        """A call has ended: its last tokens still count."""
        if self._counters and call.caller is not None and call.backend is not None:
            self._ended.append((call.caller.key_id, call.usage.total - self._seen.pop(call.request_id, 0)))

    async def run(self) -> None:
        """Read and share for ever. A missing exporter, or one without GPUs, measures nothing."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                reading = msgspec.json.decode(await self._read(), type=_Reading)
            except (UpstreamError, msgspec.DecodeError):
                continue  # nothing is lost: the counters go on, and the next reading covers the gap
            self.take(reading.gpus, reading.timestamp)

    def take(self, gpus: dict[str, float], timestamp: float) -> None:
        """A reading of the exporter; one that was seen before changes nothing."""
        if timestamp != self._sampled_at:
            self._sampled_at = timestamp
            self.share(gpus)

    def _growth(self, gpus: dict[str, float]) -> float:
        """Joules since the last reading. A GPU seen first sets its base; a counter that fell began anew."""
        used = 0.0
        for uuid, joules in gpus.items():
            last = self._counters.get(uuid)
            if last is not None:
                used += joules - last if joules >= last else joules
            self._counters[uuid] = joules
        return used

    def share(self, gpus: dict[str, float]) -> None:
        """Divide the growth of the counters (joules by GPU) since the last reading."""
        used = self._growth(gpus)
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
        if used <= 0:
            return
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
