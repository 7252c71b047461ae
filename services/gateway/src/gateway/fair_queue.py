"""Fair sharing between keys, in tokens: one class of waiting calls. Pure; no clock, no I/O.

Every key has an account: the tokens it was given, divided by its weight. The key with the smallest account goes next,
and its account grows by the expected cost of the call; when the call ends, the difference to the truth is booked
(`settle`). A key that begins to wait is lifted to the class's virtual time (the account of the key that went last), so
idleness earns no credit. This is start-time fair queueing: the bound of deficit round robin (keys that wait never
differ by more than one call each), without rounds or a quantum, and with `settle` as one addition.

Calls wait in pools (the set of engines that can serve them), so a busy engine does not keep calls from a free one.
Cost: O(log keys) a call, independent of how many calls wait.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Any

from gateway.drain_rate import Pace

Pool = tuple[Any, ...]  # the engines that can serve a call


class Ticket:
    """One call that waits, or has been given a place. `cost` in tokens; `rank` 0 is the best class."""

    __slots__ = (
        "account", "backend", "calibration", "call", "cost", "entered", "granted", "key", "number", "pool", "probe",
        "rank", "waiter", "weight",
    )  # fmt: skip

    def __init__(self, key: str, cost: float, weight: int, rank: int, pool: Pool, call: Any = None) -> None:
        self.key = key
        self.cost = cost
        self.weight = weight
        self.rank = rank
        self.pool = pool
        self.call = call
        self.number = 0  # order of arrival
        self.entered = 0.0
        self.granted: float | None = None
        self.account: Account | None = None  # where the cost was booked
        self.backend: Any = None
        self.calibration = 1.0  # the factor in `cost` by which guesses were corrected when it came
        self.probe = False  # whether it is the probe of a half-open breaker
        self.waiter: Any = None  # what to wake, for the shell

    def __repr__(self) -> str:
        return f"<Ticket {self.number} key={self.key} cost={self.cost:g} rank={self.rank}>"


class Account:
    """What one key was given in this class, in tokens for each unit of weight."""

    __slots__ = ("calls", "key", "lines", "pace", "running", "tag", "version", "weight")

    def __init__(self, key: str, weight: int) -> None:
        self.key = key
        self.weight = weight
        self.tag = 0.0
        self.version = 0  # entries in heaps with another version are stale
        self.running = 0
        self.calls = 0  # that wait
        self.pace: Pace | None = None  # at which calls that waited got places; kept by the room
        self.lines: dict[Pool, OrderedDict[int, Ticket]] = {}


class FairQueue:
    """The waiting calls of one class. `time` is the virtual time; `calls` and `tokens` count what waits."""

    def __init__(self) -> None:
        self.time = 0.0
        self.calls = 0
        self.tokens = 0.0
        self.accounts: OrderedDict[str, Account] = OrderedDict()
        self._heaps: dict[Pool, list[tuple[float, int, int, Account]]] = {}
        self._pushes = 0

    def add(self, ticket: Ticket) -> None:
        """`ticket` begins to wait."""
        account = self._account(ticket)
        self._lift(account)
        line = account.lines.get(ticket.pool)
        if line is None:
            line = account.lines[ticket.pool] = OrderedDict()
        line[ticket.number] = ticket
        account.calls += 1
        self.calls += 1
        self.tokens += ticket.cost
        if len(line) == 1:
            self._push(account, ticket.pool)

    def remove(self, ticket: Ticket) -> None:
        """`ticket` waits no more, without having been served."""
        account = self.accounts[ticket.key]
        line = account.lines[ticket.pool]
        del line[ticket.number]
        if not line:
            del account.lines[ticket.pool]
        account.calls -= 1
        self.calls -= 1
        self.tokens -= ticket.cost
        self._forget(account)

    def pools(self) -> list[Pool]:
        """The pools in which calls may wait."""
        return list(self._heaps)

    def peek(self, pool: Pool) -> tuple[float, Ticket] | None:
        """The call of `pool` that goes next, with its key's account."""
        heap = self._heaps.get(pool)
        while heap:
            tag, _, version, account = heap[0]
            line = account.lines.get(pool)
            if version == account.version and line:
                return tag, next(iter(line.values()))
            heapq.heappop(heap)
        self._heaps.pop(pool, None)
        return None

    def take(self, ticket: Ticket) -> None:
        """`ticket` (from `peek`) gets its place: book its cost."""
        account = self.accounts[ticket.key]
        account.running += 1
        self.remove(ticket)
        account.running -= 1
        self._book(account, ticket)

    def charge(self, ticket: Ticket) -> None:
        """`ticket` gets a place without having waited: book its cost."""
        account = self._account(ticket)
        self._lift(account)
        self._book(account, ticket)

    def settle(self, ticket: Ticket, used: float) -> None:
        """The call has ended and used `used` tokens."""
        account = ticket.account
        if account is None:
            return
        ticket.account = None
        account.running -= 1
        self._move(account, (used - ticket.cost) / ticket.weight)
        self._forget(account)

    def _lift(self, account: Account) -> None:
        """A key that did not wait until now has earned nothing by it."""
        if not account.calls and account.tag < self.time:
            account.tag = self.time
            account.version += 1

    def _book(self, account: Account, ticket: Ticket) -> None:
        ticket.account = account
        account.running += 1
        if account.tag > self.time:
            self.time = account.tag
        self._move(account, ticket.cost / ticket.weight)

    def _move(self, account: Account, tokens: float) -> None:
        account.tag += tokens
        account.version += 1
        for pool in account.lines:
            self._push(account, pool)

    def _account(self, ticket: Ticket) -> Account:
        account = self.accounts.get(ticket.key)
        if account is None:
            self._look_back()
            account = self.accounts[ticket.key] = Account(ticket.key, ticket.weight)
        account.weight = ticket.weight
        return account

    def _push(self, account: Account, pool: Pool) -> None:
        heap = self._heaps.setdefault(pool, [])
        self._pushes += 1
        heapq.heappush(heap, (account.tag, self._pushes, account.version, account))
        if len(heap) > 64 and len(heap) > 4 * len(self.accounts):
            first: dict[str, tuple[float, int, int, Account]] = {}  # of a key that waits again and again
            for entry in heap:
                account = entry[3]
                if entry[2] == account.version and pool in account.lines:
                    other = first.get(account.key)
                    first[account.key] = entry if other is None else min(entry, other)
            heap[:] = first.values()
            heapq.heapify(heap)

    def _forget(self, account: Account) -> None:
        # An account at or below the virtual time says nothing that a new one would not say.
        if not account.calls and not account.running and account.tag <= self.time:
            self.accounts.pop(account.key, None)

    def _look_back(self) -> None:
        """Forget keys that the virtual time has overtaken since their last call ended: no call of theirs tells.

        Two looks for each new key: what is kept follows the keys in use, however many come and go.
        """
        for _ in range(min(2, len(self.accounts))):
            key = next(iter(self.accounts))
            self.accounts.move_to_end(key)
            self._forget(self.accounts[key])

    def longest(self) -> Account | None:
        """The key with the most waiting calls for its weight."""
        return max(
            (account for account in self.accounts.values() if account.calls),
            key=lambda account: account.calls / account.weight,
            default=None,
        )

    def newest(self, account: Account) -> Ticket:
        """The call of `account` that began to wait last."""
        return max((next(reversed(line.values())) for line in account.lines.values()), key=lambda t: t.number)

    def __repr__(self) -> str:
        return f"<FairQueue time={self.time:g} calls={self.calls} tokens={self.tokens:g} accounts={len(self.accounts)}>"
