"""Whether and when vLLM is started again. Pure.

Each run that ended counts in a sliding window. Within the budget the next start waits twice as long as the one before;
with the budget spent the engine is failed until the oldest restart leaves the window. One that cannot start, or that
failed to start twice in a row for the same reason, is failed for good: someone has to change something.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Turn:
    """What comes next: `wait` seconds (None: for ever), shown as failed or as starting."""

    wait: float | None
    failed: bool


class Restarts:
    """The history that the decision needs."""

    def __init__(self, budget: int, window: float) -> None:
        """`budget` restarts within `window` seconds."""
        self._budget, self._window = budget, window
        self._recent: deque[float] = deque()
        self._never_started_for: str | None = None
        self.count = 0  # since the supervisor started

    def forget(self) -> None:
        """Somebody mended something: begin anew."""
        self._recent.clear()
        self._never_started_for = None

    def after(self, now: float, was_ready: bool, again: bool, words: str) -> Turn:
        """A run ended for the reason `words`; what comes next."""
        self.count += 1
        if was_ready:
            self._never_started_for = None
        else:
            if not again or self._never_started_for == words:
                return Turn(None, True)
            self._never_started_for = words
        while self._recent and now - self._recent[0] >= self._window:
            self._recent.popleft()
        if len(self._recent) >= self._budget:
            if not self._budget:
                return Turn(None, True)
            wait = self._recent[0] + self._window - now
            self._recent.popleft()
            self._recent.append(now + wait)
            return Turn(wait, True)
        wait = min(FIRST_WAIT_SECONDS * 2 ** len(self._recent), LONGEST_WAIT_SECONDS)
        self._recent.append(now)
        return Turn(wait, False)
