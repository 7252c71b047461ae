"""What one key, or one organisation, has used and holds; and which day it is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from gateway.call import Caller
from gateway.errors import GatewayError
from gateway.gcra import Rate, per_minute

_DAYS_KEPT = 4  # the machine's clock may be wrong by days and be set right again: what was used then still counts


class Day:
    """One quota day of one account, in tokens: `used` is settled, `held` is an upper bound of what still runs."""

    __slots__ = ("held", "name", "requests", "used")

    def __init__(self, name: str) -> None:
        self.name = name
        self.used = 0
        self.held = 0
        self.requests = 0


class Account:
    """The limits' state of a key or an organisation. `live`: request id -> tokens taken from the minute.

    `caller`, `requests_rate` and `tokens_rate` are a key's limits as they were last looked at. `revoked`: since when
    (perf_counter) a call must have begun to be one of a secret that is valid, and what the others are told.
    """

    __slots__ = (
        "_days", "caller", "live", "requests_rate", "requests_tat", "revoked", "tokens_rate", "tokens_tat", "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.caller: Caller | None = None
        self.requests_rate: Rate | None = None
        self.tokens_rate: Rate | None = None
        self.requests_tat = 0.0
        self.tokens_tat = 0.0
        self.revoked: tuple[float, GatewayError] | None = None
        self.live: dict[str, int] = {}
        self.waiting: deque[Any] = deque()
        self._days: dict[str, Day] = {}

    def bind(self, caller: Caller) -> None:
        """Take over the limits of the key as it is now."""
        limits = caller.limits
        self.caller = caller
        self.requests_rate = per_minute(limits.requests_per_minute) if limits.requests_per_minute else None
        self.tokens_rate = per_minute(limits.tokens_per_minute) if limits.tokens_per_minute else None

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits or is held on it."""
        return not self.live and not self.waiting and not any(day.held for day in self._days.values())

    def day(self, name: str) -> Day:
        """The day `name` (ISO date). A call that runs past midnight settles into the day in which it began."""
        day = self._days.get(name)
        if day is None:
            day = self._days[name] = Day(name)
            for old in sorted(self._days)[:-_DAYS_KEPT]:
                if old != name and not self._days[old].held:
                    del self._days[old]
        return day


class Days:
    """Quota days in one time zone; the current one is computed once a day."""

    def __init__(self, zone: str, clock: Callable[[], float] = time.time) -> None:
        self._zone = ZoneInfo(zone)
        self._clock = clock
        self._today = ""
        self._start = self._end = 0.0

    def today(self) -> str:
        """The ISO date of the running day."""
        now = self._clock()
        if not self._start <= now < self._end:
            self._turn(now)
        return self._today

    def of(self, account: Account) -> Day:
        """The running day of `account`."""
        if not self._start <= self._clock() < self._end:
            self._turn(self._clock())
        return account._days.get(self._today) or account.day(self._today)

    def seconds_left(self) -> float:
        """Seconds until the next day begins."""
        now = self._clock()
        if not self._start <= now < self._end:
            self._turn(now)
        return self._end - now

    def resets_at(self) -> float:
        """When the next day begins, Unix seconds."""
        self.today()
        return self._end

    def _turn(self, now: float) -> None:
        date = datetime.fromtimestamp(now, self._zone).date()

        def midnight(of: Any) -> float:
            return datetime(of.year, of.month, of.day, tzinfo=self._zone).timestamp()

        self._today = date.isoformat()
        self._start, self._end = midnight(date), midnight(date + timedelta(days=1))
