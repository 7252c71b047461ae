"""The ledger against the engines' own counters: what they counted since we started, less what we know of.

Zero, or close to it, while all traffic passes through this gateway. Engines count in steps and after the fact, so a
difference that comes and goes is normal; one that grows is lost or invented usage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from gateway.call import Call

Counters = Mapping[str, tuple[int, int]]
"""Engine name -> tokens (prompt and generation) that it has counted since it started, and how many of them were its own
supervisor's (canaries and warm-up, which pass no gateway)."""


class Reconciliation:
    """Compares. `read` asks the engines (an engine that does not answer is missing); `settled` is the ledger's sum of
    tokens since the start of this process; `live` are the calls under way."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Counters]],
        settled: Callable[[], int],
        live: Callable[[], Iterable[Call]],
    ) -> None:
        self._read = read
        self._settled = settled
        self._live = live
        self._last: dict[str, int] = {}
        self._counted = 0
        self._base: int | None = None
        self.drift = 0
        """Tokens the engines counted less tokens settled or in flight, since the first sample."""

    def _known(self) -> int:
        return self._settled() + sum(call.computed_tokens for call in self._live() if not call.settled)

    def _growth(self, name: str, value: int) -> int:
        last = self._last.get(name)
        self._last[name] = value
        if last is None:
            return 0
        return value - last if value >= last else value

    async def sample(self) -> int:
        """Read the engines once and return the new `drift`.

        A counter that fell belongs to an engine that was restarted: it counts from zero. An engine that is seen for the
        first time counts from what it has.
        """
        counters = await self._read()
        first = self._base is None
        if first and not counters:
            return self.drift
        for name, (tokens, own) in counters.items():
            self._counted += self._growth(name, tokens) - self._growth(f"{name} own", own)
        known = self._known()
        if self._base is None:
            self._base = known
        self.drift = self._counted - (known - self._base)
        return self.drift
