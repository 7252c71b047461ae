"""Joules by key: the GPUs' energy counter, divided over the calls that ran.

Between two readings of the exporter the energy that was used is shared among the calls by the tokens that they moved in
that time (prompt tokens when they were computed, completion tokens as they came); when none moved a token it is shared
evenly among those in the engine, and when none was there it is `idle`. What a GPU used while it could not be read for
long is nobody's (`unknown`). The three add up to the counter's growth.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.call import Call

PERIOD_SECONDS = 1.0
LONGEST_SECONDS = 60.0  # between two readings of a GPU; who ran in a longer time says little of who used its energy


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
        self._counters: dict[str, tuple[float, float]] = {}  # joules by GPU, and when they were read
        self._sampled_at = 0.0
        self._seen: dict[str, int] = {}  # tokens of running calls at the last reading
        # Tokens moved since then by calls that have ended, and their number: by key, however long no reading comes.
        self._ended: dict[str, list[int]] = {}

    def note(self, call: Call) -> None:
        """A call has ended: its last tokens still count."""
        if self._counters and call.caller is not None and call.backend is not None:
            ended = self._ended.get(call.caller.key_id)
            if ended is None:
                ended = self._ended[call.caller.key_id] = [0, 0]
            tokens = call.usage.total - self._seen.pop(call.request_id, 0)
            if tokens > 0:
                ended[0] += tokens
            ended[1] += 1

    async def run(self) -> None:
        """Read and share for ever. A missing exporter, or one without GPUs, measures nothing."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                reading = msgspec.json.decode(await self._read(), type=_Reading)
            except (UpstreamError, msgspec.DecodeError):
                continue  # no joule is lost: the counters go on, and the next reading covers the gap
            self.take(reading.gpus, reading.timestamp)

    def take(self, gpus: dict[str, float], timestamp: float) -> None:
        """A reading of the exporter; one that was seen before changes nothing."""
        if timestamp != self._sampled_at:
            self._sampled_at = timestamp
            self._share(*self._growth(gpus, timestamp))

    def _growth(self, gpus: dict[str, float], at: float) -> tuple[float, float]:
        """Joules since the last reading: those of a short time, and those of a gap. A GPU seen first sets its base; a
        counter that fell began anew."""
        used = unknown = 0.0
        for uuid, joules in gpus.items():
            if (last := self._counters.get(uuid)) is not None:
                before, since = last
                grown = joules - before if joules >= before else joules
                if 0 < at - since <= LONGEST_SECONDS:
                    used += grown
                else:
                    unknown += grown
            self._counters[uuid] = joules, at
        return used, unknown

    def _share(self, used: float, unknown: float) -> None:
        """Divide the joules that were used since the last reading."""
        moved = {key_id: tokens for key_id, (tokens, _) in self._ended.items() if tokens}
        present = {key_id: calls for key_id, (_, calls) in self._ended.items()}
        self._ended.clear()
        seen: dict[str, int] = {}
        for call in self._calls():
            if call.stage != "forward" or call.caller is None:
                continue
            key_id = call.caller.key_id
            seen[call.request_id] = call.usage.total
            present[key_id] = present.get(key_id, 0) + 1
            if (tokens := call.usage.total - self._seen.get(call.request_id, 0)) > 0:
                moved[key_id] = moved.get(key_id, 0) + tokens
        self._seen = seen
        if unknown > 0:
            self._count("unknown", unknown)
        if used <= 0:
            return
        if not present:
            self._count("idle", used)
            return
        weights = moved or present
        whole = sum(weights.values())
        self._count("calls", used)
        self._record({key_id: used * weight / whole for key_id, weight in weights.items()})
