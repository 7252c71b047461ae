"""Decides from progress whether the engine hangs. Pure: readings and times come in, a verdict comes out.

Progress is a token that left, a counter that moved, or a canary (one token, timed) that came back. Silence alone proves
nothing: an idle engine is silent, and so is one long prefill, behind which the canary queues. So after some silence a
canary is sent, and only if it does not come back, and nothing else moves, for longer than a bound, the engine hangs.
The bound follows the longest prompt that still waits for its first byte: no less than twelve times what the warm-up
measured for so many tokens, because attention makes long prompts slower by the token and a loaded engine slower again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PATIENCE = 12.0
BYTES_PER_TOKEN = 3.0  # prose has four or more: tokens are rather over- than underestimated
QUIET_SECONDS = 2.0  # silence with calls inside after which a canary is due


class Verdict(StrEnum):
    """What the readings say."""

    HEALTHY = "healthy"
    LATE = "late"
    HUNG = "hung"


@dataclass(frozen=True)
class Reading:
    """What one look at the engine gave; `counters` are any numbers that grow with progress."""

    calls: int
    longest_silent_bytes: int
    counters: tuple[float, ...]


class Watchdog:
    """The state of suspicion. All times are seconds of one monotonic clock."""

    def __init__(
        self, now: float, *, hang: float, most: float, canary: float, prefill_rate: float, longest_tokens: int
    ) -> None:
        """`hang`, `most`: least and largest bound; `canary`: time between idle canaries; `prefill_rate`: tokens/s."""
        self._hang, self._most, self._canary_every = hang, most, canary
        self._rate = max(prefill_rate, 1.0)
        self._longest_tokens = longest_tokens
        self._last_progress = now
        self._last_tick = now
        self._suspect_since: float | None = None
        self._longest_bytes = 0  # the longest prompt seen since the suspicion began
        self._last: Reading | None = None
        self._answers = True  # the API server, at the last look
        self.canary_works = True  # False: this model cannot answer one; calls inside must do

    def tick(self, now: float, usual: float) -> None:
        """Call before each look, `usual` seconds apart. Time in which we did not run ourselves is nobody's hang."""
        gap = now - self._last_tick
        if gap > 3 * usual + 1 and self._suspect_since is not None:
            self._suspect_since += gap - usual
        self._last_tick = now

    def look(self, now: float, reading: Reading | None) -> None:
        """Take a reading in; None when the API server did not answer."""
        self._answers = reading is not None
        if reading is None:
            if self._suspect_since is None and not self.canary_works:
                self._suspect_since = now
            return
        if self._last is None or reading.counters != self._last.counters:
            self._progress(now)
        self._last = reading
        self._longest_bytes = max(self._longest_bytes, reading.longest_silent_bytes)
        quiet = now - self._last_progress >= QUIET_SECONDS
        if not self.canary_works:
            if reading.calls and quiet:
                self._suspect_since = self._suspect_since or now
            elif not reading.calls:
                self._suspect_since = None

    def wants_canary(self, now: float) -> bool:
        """Whether a canary is due; the caller sends one at a time."""
        if not self.canary_works:
            return False
        busy = self._last is not None and self._last.calls > 0
        alert = busy or not self._answers or self._suspect_since is not None
        due = QUIET_SECONDS if alert else self._canary_every
        return now - self._last_progress >= due

    def canary_sent(self, now: float) -> None:
        """A canary is on its way: from here on silence is suspicious."""
        if self._suspect_since is None:
            self._suspect_since = now
            self._longest_bytes = self._last.longest_silent_bytes if self._last else 0

    def canary_back(self, now: float) -> None:
        """The canary came back with a token."""
        self._progress(now)

    def bound(self) -> float:
        """Seconds of suspicion that make a hang, with the prompts that are inside now."""
        tokens = min(self._longest_bytes / BYTES_PER_TOKEN, self._longest_tokens)
        return min(max(self._hang, PATIENCE * tokens / self._rate), self._most)

    def suspicion(self, now: float) -> float:
        """For how long nothing has moved since someone looked for it, seconds."""
        return 0.0 if self._suspect_since is None else now - self._suspect_since

    def verdict(self, now: float) -> Verdict:
        """Hung, late (past half the bound), or healthy."""
        suspicion, bound = self.suspicion(now), self.bound()
        if suspicion > bound:
            return Verdict.HUNG
        return Verdict.LATE if suspicion > bound / 2 else Verdict.HEALTHY

    def _progress(self, now: float) -> None:
        self._last_progress = now
        self._suspect_since = None
        self._longest_bytes = 0
