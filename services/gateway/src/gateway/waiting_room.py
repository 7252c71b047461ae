"""The bounded room in front of the engines: who waits, who goes next, who must leave. Pure; seconds are passed in.

Three classes, each a `FairQueue`; a better class goes first. A class ages by the tokens that are served past it: once
they are `PATIENCE` times what its next call costs, that call goes first. So nothing starves, and a lower class never
gets more than a small share while a better one is waiting. (Moving single old calls up would let a key that fills the
room, and so has the oldest calls, overtake the keys that it should share with.)

When the room is full, a newcomer may push out a call of a worse class, or of a key that holds far more than its share:
one key cannot lock the others out by filling the room.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from gateway.drain_rate import Pace
from gateway.fair_queue import Account, FairQueue, Pool, Ticket

RANKS = 3
MARGIN = 2.0  # without it, equal keys would push each other out
PATIENCE = 15.0  # a class gets at least one token in sixteen while it waits


class WaitingRoom:
    """At most `calls` calls and `tokens` tokens wait, none longer than `seconds`."""

    def __init__(self, calls: int, tokens: float, seconds: float) -> None:
        self.limit_calls = calls
        self.limit_tokens = tokens
        self.seconds = seconds
        self.classes = tuple(FairQueue() for _ in range(RANKS))
        self.calls = 0
        self.tokens = 0.0
        self._numbers = itertools.count(1)
        self._arrivals: OrderedDict[int, Ticket] = OrderedDict()
        self._passed = [0.0] * RANKS  # tokens served to better classes while this one waited

    def add(self, ticket: Ticket, now: float) -> None:
        """`ticket` begins to wait."""
        ticket.number = next(self._numbers)
        ticket.entered = now
        self._arrivals[ticket.number] = ticket
        self.calls += 1
        self.tokens += ticket.cost
        queue = self.classes[ticket.rank]
        queue.add(ticket)
        account = queue.accounts[ticket.key]
        if account.pace is None:
            account.pace = Pace()
        account.pace.busy(now)

    def remove(self, ticket: Ticket, now: float) -> None:
        """`ticket` leaves without a place."""
        queue = self.classes[ticket.rank]
        account = queue.accounts[ticket.key]
        queue.remove(ticket)
        self._gone(ticket, account, now)

    def next(self, has_place: Callable[[Pool], bool], now: float) -> Ticket | None:
        """Take the call that goes next among those whose pool `has_place`; its cost is booked."""
        chosen: Ticket | None = None
        waiting: list[int] = []
        for rank, queue in enumerate(self.classes):
            if not queue.calls:
                self._passed[rank] = 0.0
                continue
            found = self._first(queue, has_place)
            if found is not None and (chosen is None or self._passed[rank] >= PATIENCE * found.cost):
                chosen = found
            waiting.append(rank)
        if chosen is None:
            return None
        for rank in waiting:
            if rank > chosen.rank:
                self._passed[rank] += chosen.cost
        self._passed[chosen.rank] = max(0.0, self._passed[chosen.rank] - PATIENCE * chosen.cost)
        queue = self.classes[chosen.rank]
        account = queue.accounts[chosen.key]
        queue.take(chosen)
        if account.pace is not None:
            account.pace.admitted(now)
        self._gone(chosen, account, now)
        return chosen

    def _first(self, queue: FairQueue, has_place: Callable[[Pool], bool]) -> Ticket | None:
        best: tuple[float, int, Ticket] | None = None
        for pool in queue.pools():
            if has_place(pool) and (found := queue.peek(pool)) is not None:
                entry = (found[0], found[1].number, found[1])
                if best is None or entry[:2] < best[:2]:
                    best = entry
        return best[2] if best is not None else None

    def charge(self, ticket: Ticket, now: float) -> None:
        """`ticket` takes a place without waiting."""
        ticket.number = next(self._numbers)
        ticket.entered = now
        self.classes[ticket.rank].charge(ticket)

    def settle(self, ticket: Ticket, used: float) -> None:
        """A call that had a place has ended and used `used` tokens."""
        self.classes[ticket.rank].settle(ticket, used)

    def full(self, cost: float, calls: int | None = None) -> bool:
        """Whether a call of `cost` tokens finds no room. A single call may be larger than the room."""
        if self.calls >= (self.limit_calls if calls is None else min(calls, self.limit_calls)):
            return True
        return self.calls > 0 and self.tokens + cost > self.limit_tokens

    def victim(self, ticket: Ticket, mine: float, share: float) -> Ticket | None:
        """Who gives way to `ticket`, or None. `mine` is what its key would hold, `share` what it may hold, both for a
        unit of weight.

        Any call of a worse class; in the same class only one of a key that holds more than its share and `MARGIN`
        times what the newcomer's key would, for a key that keeps within its own share.
        """
        for rank in range(RANKS - 1, ticket.rank - 1, -1):
            queue = self.classes[rank]
            account = queue.longest()
            if account is None or account.key == ticket.key:
                continue
            if rank == ticket.rank:
                held = account.calls / account.weight
                if mine > share or held <= max(share, MARGIN * mine):
                    return None
            return queue.newest(account)
        return None

    def of(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """How many calls of this key wait in this class, and how many of them get a place a second, where known."""
        account = self.classes[ticket.rank].accounts.get(ticket.key)
        if account is None or account.pace is None:
            return 0, None
        return account.calls, account.pace.measured(now)

    def waiting_of(self, key: str, rank: int) -> int:
        """How many calls of `key` wait in a class."""
        account = self.classes[rank].accounts.get(key)
        return account.calls if account is not None else 0

    def share(self, ticket: Ticket, calls: int, others: Mapping[str, int]) -> float:
        """Places for a unit of weight if this key, those that wait in its class and `others` (key and weight) shared
        `calls` places; at least one."""
        waiting = self.classes[ticket.rank].accounts.items()
        weights = {**others, **{key: account.weight for key, account in waiting if account.calls}}
        weights[ticket.key] = ticket.weight
        return max(1.0, calls / sum(weights.values()))

    def late(self, now: float) -> Iterator[Ticket]:
        """Take out every call that has waited as long as it may."""
        while self._arrivals:
            ticket = next(iter(self._arrivals.values()))
            if ticket.entered + self.seconds > now:
                return
            self.remove(ticket, now)
            yield ticket

    def next_deadline(self) -> float | None:
        """When the first call will have waited as long as it may."""
        return next(iter(self._arrivals.values())).entered + self.seconds if self._arrivals else None

    def waiting(self) -> list[Ticket]:
        """Everyone, in order of arrival."""
        return list(self._arrivals.values())

    def _gone(self, ticket: Ticket, account: Account, now: float) -> None:
        if not account.calls and account.pace is not None:
            account.pace.idle(now)
        del self._arrivals[ticket.number]
        self.calls -= 1
        self.tokens -= ticket.cost
        if not self.calls:
            self.tokens = 0.0  # no drift by rounding

    def __repr__(self) -> str:
        return f"<WaitingRoom calls={self.calls} tokens={self.tokens:g} {' '.join(map(repr, self.classes))}>"
