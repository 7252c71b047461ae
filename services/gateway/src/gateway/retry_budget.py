"""How often calls may be tried again: little of each call, and a small share of all of them together."""

from __future__ import annotations

MOST_RETRIES = 2  # of one call, however much of the budget is left


class RetryBudget:
    """At most `ratio` retries a call on the long run, and a few at once after a quiet time."""

    def __init__(self, ratio: float, burst: float = 10.0) -> None:
        self._ratio = ratio
        self._burst = burst if ratio > 0 else 0.0
        self._tokens = self._burst

    def earn(self) -> None:
        """A call was made."""
        if self._tokens < self._burst:
            self._tokens = min(self._burst, self._tokens + self._ratio)

    @property
    def left(self) -> bool:
        """Whether one more retry is allowed."""
        return self._tokens >= 1.0

    def take(self) -> None:
        """A call is tried again."""
        self._tokens -= 1.0
