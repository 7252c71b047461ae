"""Dispatch: which engine gets this call. Pure and synchronous; runs inside capacity's critical section.

The least loaded engine by outstanding tokens for its weight, unless the call's conversation has a home: rendezvous
hashing gives every conversation one engine (whose prefix cache knows it) as long as that one is not loaded much more
than the others. When engines come or go only their own conversations move.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

BOUND = 1.25  # a home may be loaded this much more than the mean
SLACK_TOKENS = 2048.0  # … or this much, which is about one prompt: idle engines are not worth a cold cache


class Candidate(Protocol):
    """What dispatch needs to know about an engine; `outstanding` in tokens."""

    @property
    def name(self) -> str:
        """Unique name."""

    @property
    def weight(self) -> int:
        """Share of the work, relative to the others."""

    @property
    def outstanding(self) -> float:
        """Tokens of the calls it works on."""


C = TypeVar("C", bound=Candidate)


def choose(candidates: Sequence[C], affinity: int | None, cost: float) -> C:
    """The engine for a call of `cost` tokens. `candidates` can all take it now; at least one."""
    if len(candidates) == 1:
        return candidates[0]
    if affinity is not None:
        home = max(candidates, key=lambda c: c.weight * _kinship(c.name, affinity))
        mean = (sum(c.outstanding for c in candidates) + cost) / sum(c.weight for c in candidates)
        if (home.outstanding + cost) / home.weight <= mean * BOUND + SLACK_TOKENS:
            return home
    return min(candidates, key=lambda c: ((c.outstanding + cost) / c.weight, c.name))


def _kinship(name: str, affinity: int) -> float:
    """Weighted rendezvous: an engine of weight 2 is home to twice as many conversations."""
    mixed = zlib.crc32(name.encode(), affinity & 0xFFFFFFFF) * 2654435761 & 0xFFFFFFFF
    return -1.0 / math.log((mixed + 0.5) / 2**32)
