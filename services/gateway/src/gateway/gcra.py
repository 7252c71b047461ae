"""The generic cell rate algorithm: one number per limit, pure, time injected.

A limit of N a minute is a bucket of N units that refills evenly. The only state is `tat`, the theoretical arrival
time: the moment at which the bucket is full again. Units may be given back or charged later (a call's tokens are
estimated first and known at its end), so `tat` may lie in the past (a full bucket) or further ahead than the bucket is
deep (debt, which is paid by waiting). Times are seconds of any monotonic clock.
"""

from __future__ import annotations

from functools import lru_cache

MINUTE = 60.0


class Rate:
    """`limit` units per `period` seconds, all of them available at once when nothing was used.

    `interval` is the time in which one unit refills, seconds.
    """

    __slots__ = ("_slack", "interval", "limit", "period")

    def __init__(self, limit: int, period: float = MINUTE) -> None:
        self.limit = limit
        self.period = period
        self.interval = period / limit
        # A rounding error of the clock's size must not turn 'now' into 'in a moment'.
        self._slack = 1e-6 * max(1.0, self.interval)

    def wait(self, tat: float, now: float, cost: int = 1) -> float:
        """Seconds until `cost` units are there; 0 if they are. More than the bucket holds counts as a full bucket."""
        if tat <= now:
            return 0.0  # it is full
        if cost > self.limit:
            cost = self.limit
        behind = tat + cost * self.interval - self.period - now
        return behind if behind > self._slack else 0.0

    def take(self, tat: float, now: float, cost: int = 1) -> float:
        """The new `tat` after using `cost` units, whether they are there or not."""
        return (tat if tat > now else now) + cost * self.interval

    def give_back(self, tat: float, cost: int) -> float:
        """The new `tat` after returning `cost` units that `take` used; a bucket is never more than full."""
        return tat - cost * self.interval

    def remaining(self, tat: float, now: float) -> int:
        """Whole units available now; 0 while in debt."""
        left = int((self.period - (tat - now if tat > now else 0.0)) / self.interval + 1e-6)
        return left if left > 0 else 0

    def reset(self, tat: float, now: float) -> float:
        """Seconds until the bucket is full."""
        return max(0.0, tat - now)


@lru_cache(maxsize=1024)
def per_minute(limit: int) -> Rate:
    """The rate of `limit` units a minute; the same object for the same limit."""
    return Rate(limit)


class Addresses:
    """One bucket of `limit` requests a minute for each address; as many are remembered as memory allows."""

    MOST = 65_536

    def __init__(self, limit: int) -> None:
        self.rate = per_minute(limit)
        self._tats: dict[str, float] = {}

    def wait(self, address: str, now: float) -> float:
        """Seconds until this address may make a request."""
        tat = self._tats.get(address, 0.0)
        return self.rate.wait(tat, now) if tat > now else 0.0

    def take(self, address: str, now: float) -> None:
        """It makes one."""
        tats = self._tats
        if len(tats) >= self.MOST and address not in tats:
            tats = self._tats = {known: tat for known, tat in tats.items() if tat > now}
            while len(tats) >= self.MOST:
                tats.pop(next(iter(tats)))  # the one that was first seen longest ago
        tats[address] = self.rate.take(tats.get(address, 0.0), now)
