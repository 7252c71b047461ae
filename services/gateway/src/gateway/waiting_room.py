"""The bounded room in front of the engines: who waits, who goes next, who must leave. Pure; seconds are passed in.

Three classes, each a `FairQueue`; a better class goes first. A call that has waited long enough is moved up one class
(ageing), where it shares fairly with the others, so nothing starves. When the room is full, a newcomer pushes out the
newest call of the key that holds the most places, if that key holds more than the newcomer's would or is of a worse
class: one key cannot lock the others out by filling the room.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from gateway.fair_queue import FairQueue, Pool, Ticket

RANKS = 3
AGEING_SHARE = 1 / 6  # of the longest wait: after a third of it even the lowest class is in the first


class WaitingRoom:
    """At most `calls` calls and `tokens` tokens wait, none longer than `seconds`."""

    def __init__(self, calls: int, tokens: float, seconds: float) -> None:
        self.limit_calls = calls
        self.limit_tokens = tokens
        self.seconds = seconds
        self.classes = tuple(FairQueue() for _ in range(RANKS))
        self.calls = 0
        self.tokens = 0.0
        self._ageing_seconds = seconds * AGEING_SHARE
        self._numbers = itertools.count(1)
        self._arrivals: OrderedDict[int, Ticket] = OrderedDict()
        # Calls that can still rise from rank r, in the order in which they will: (when, call).
        self._rising: tuple[OrderedDict[int, tuple[float, Ticket]], ...] = tuple(OrderedDict() for _ in range(RANKS))

    def add(self, ticket: Ticket, now: float) -> None:
        """`ticket` begins to wait."""
        ticket.number = next(self._numbers)
        ticket.entered = now
        self._arrivals[ticket.number] = ticket
        self.calls += 1
        self.tokens += ticket.cost
        self.classes[ticket.rank].add(ticket)
        self._plan_rise(ticket, now)

    def remove(self, ticket: Ticket) -> None:
        """`ticket` leaves without a place."""
        self.classes[ticket.rank].remove(ticket)
        self._gone(ticket)

    def next(self, has_place: Callable[[Pool], bool], now: float) -> Ticket | None:
        """Take the call that goes next among those whose pool `has_place`; its cost is booked."""
        if not self.calls:
            return None
        self._age(now)
        for queue in self.classes:
            if not queue.calls:
                continue
            best: tuple[float, Ticket] | None = None
            for pool in queue.pools():
                if has_place(pool):
                    found = queue.peek(pool)
                    if found is not None and (best is None or (found[0], found[1].number) < (best[0], best[1].number)):
                        best = found
            if best is not None:
                queue.take(best[1])
                self._gone(best[1])
                return best[1]
        return None

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

    def victim(self, ticket: Ticket) -> Ticket | None:
        """Who must leave so that `ticket` can come in, or None."""
        for rank in range(RANKS - 1, ticket.rank - 1, -1):
            account = self.classes[rank].longest()
            if account is None:
                continue
            if rank == ticket.rank:
                mine = self.classes[rank].accounts.get(ticket.key)
                waiting = (mine.calls if mine is not None else 0) + 1
                if account.calls / account.weight <= waiting / ticket.weight:
                    return None
            elif account.key == ticket.key:
                continue  # nobody pushes out its own calls
            return self.classes[rank].newest(account)
        return None

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
        self._rising[ticket.rank].pop(ticket.number, None)
        self.calls -= 1
        self.tokens -= ticket.cost
        if not self.calls:
            self.tokens = 0.0  # no drift by rounding

    def _plan_rise(self, ticket: Ticket, now: float) -> None:
        if ticket.rank > 0:
            self._rising[ticket.rank][ticket.number] = (now + self._ageing_seconds, ticket)

    def _age(self, now: float) -> None:
        for rank in range(1, RANKS):
            rising = self._rising[rank]
            while rising:
                number, (when, ticket) = next(iter(rising.items()))
                if when > now:
                    break
                del rising[number]
                self.classes[rank].remove(ticket)
                ticket.rank -= 1
                self.classes[ticket.rank].add(ticket)
                self._plan_rise(ticket, now)

    def __repr__(self) -> str:
        return f"<WaitingRoom calls={self.calls} tokens={self.tokens:g} {' '.join(map(repr, self.classes))}>"
