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
from collections.abc import Callable, Iterator

from gateway.fair_queue import FairQueue, Pool, Ticket

RANKS = 3
MARGIN = 1.5
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
        self.classes[ticket.rank].add(ticket)

    def remove(self, ticket: Ticket) -> None:
        """`ticket` leaves without a place."""
        self.classes[ticket.rank].remove(ticket)
        self._gone(ticket)

    def next(self, has_place: Callable[[Pool], bool]) -> Ticket | None:
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
        self.classes[chosen.rank].take(chosen)
        self._gone(chosen)
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

    def victim(self, ticket: Ticket, calls: int) -> Ticket | None:
        """Who must leave a room of `calls` places so that `ticket` can come in, or None.

        Any call of a worse class; in the same class only one of a key that holds more than `MARGIN` times its
        share of the room, for a key that keeps within its own. Without a margin equal keys would push each other out.
        """
        for rank in range(RANKS - 1, ticket.rank - 1, -1):
            queue = self.classes[rank]
            account = queue.longest()
            if account is None or account.key == ticket.key:
                continue
            if rank == ticket.rank:
                share = self.share_of_room(ticket, calls)
                if account.calls / account.weight <= MARGIN * share or not self.within_share(ticket, share):
                    return None
            return queue.newest(account)
        return None

    def share_of_room(self, ticket: Ticket, calls: int, strangers: int = 0) -> float:
        """Places for a unit of weight if the keys that wait in this class, and `strangers`, shared `calls` places."""
        queue = self.classes[ticket.rank]
        weights = sum(account.weight for account in queue.accounts.values() if account.calls) + strangers
        mine = queue.accounts.get(ticket.key)
        if mine is None or not mine.calls:
            weights += ticket.weight
        return max(1.0, calls / weights)

    def within_share(self, ticket: Ticket, share: float) -> bool:
        """Whether the key would hold no more than `share` with this call."""
        mine = self.classes[ticket.rank].accounts.get(ticket.key)
        return ((mine.calls if mine is not None else 0) + 1) / ticket.weight <= share

    def late(self, now: float) -> Iterator[Ticket]:
        """Take out every call that has waited as long as it may."""
        while self._arrivals:
            ticket = next(iter(self._arrivals.values()))
            if ticket.entered + self.seconds > now:
                return
            self.remove(ticket)
            yield ticket

    def next_deadline(self) -> float | None:
        """When the first call will have waited as long as it may."""
        return next(iter(self._arrivals.values())).entered + self.seconds if self._arrivals else None

    def waiting(self) -> list[Ticket]:
        """Everyone, in order of arrival."""
        return list(self._arrivals.values())

    def share(self, ticket: Ticket) -> float:
        """Tokens that will be served before a call like `ticket`, if it began to wait now, by fair sharing."""
        ahead = sum(queue.tokens for queue in self.classes[: ticket.rank])
        queue = self.classes[ticket.rank]
        mine = queue.accounts.get(ticket.key)
        own = sum(t.cost for line in mine.lines.values() for t in line.values()) if mine is not None else 0.0
        weights = sum(account.weight for account in queue.accounts.values() if account.calls)
        if mine is None or not mine.calls:
            weights += ticket.weight
        return ahead + min(queue.tokens, own * weights / ticket.weight)

    def _gone(self, ticket: Ticket) -> None:
        del self._arrivals[ticket.number]
        self.calls -= 1
        self.tokens -= ticket.cost
        if not self.calls:
            self.tokens = 0.0  # no drift by rounding

    def __repr__(self) -> str:
        return f"<WaitingRoom calls={self.calls} tokens={self.tokens:g} {' '.join(map(repr, self.classes))}>"
