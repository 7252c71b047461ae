"""Calls that wait because only other calls' holds stand between them and a quota: first come, first served.

There is room for so many calls of all keys. When it is full, a call of a key that has few in it takes the place of
the last one of the key that has most: one key cannot lock the others out by filling it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.account import Account
from gateway.call import Call
from gateway.errors import CapacityError, GatewayError, RateLimitExceeded
from gateway.stages.estimate import Ask

MARGIN = 2  # so many times what the newcomer's key would have; without it, equal keys would push each other out

Take = Callable[[Call, Ask], Account | None]
"""Takes every limit for a call, raises its refusal, or returns the account that it still has to wait for."""


class _Waiter:
    __slots__ = ("ask", "call", "counted", "future", "key_id")

    def __init__(self, call: Call, key_id: str, wanted: Ask, future: asyncio.Future[None]) -> None:
        self.call = call
        self.key_id = key_id
        self.ask = wanted
        self.future = future
        self.counted = True


class HoldLine:
    """One line for each account (`account.waiting`). At most `most` calls wait, for at most `seconds`."""

    def __init__(self, take: Take, most: int, seconds: float) -> None:
        self._take = take
        self._most = most
        self._seconds = seconds
        self._accounts: set[Account] = set()
        self._of: dict[str, int] = {}  # calls that wait, by key
        self.calls = 0
        """Calls that wait."""

    async def wait(self, call: Call, wanted: Ask, account: Account) -> None:
        """Return when every limit has been taken for `call`. Raises the refusal of a limit, or that of the line."""
        assert call.caller is not None
        key_id = call.caller.key_id
        if self.calls >= self._most:
            self._make_room(key_id)
        waiter = _Waiter(call, key_id, wanted, asyncio.get_running_loop().create_future())
        account.waiting.append(waiter)
        self._accounts.add(account)
        self.calls += 1
        self._of[key_id] = self._of.get(key_id, 0) + 1
        try:
            async with asyncio.timeout(self._seconds):
                await waiter.future
        except TimeoutError:
            if call.hold is None:  # else it was admitted in the very last moment
                raise _held("The tokens left today are held by other calls.") from None
        finally:
            self._discount(waiter)
            if waiter in account.waiting:
                account.waiting.remove(waiter)
                self.wake(account)

    def _make_room(self, key_id: str) -> None:
        """Refuse the last call of the key that has most, or the newcomer, one of `key_id`."""
        refusal = _held("Too many calls wait for this quota.")
        greedy = max(self._of, key=self._of.__getitem__, default=key_id)
        if self._of.get(greedy, 0) <= MARGIN * (self._of.get(key_id, 0) + 1):
            raise refusal
        for account in self._accounts:
            for waiter in reversed(account.waiting):
                if waiter.key_id == greedy and not waiter.future.done():
                    waiter.future.set_exception(refusal)
                    self._discount(waiter)
                    return
        raise refusal  # all of them have just been told

    def _discount(self, waiter: _Waiter) -> None:
        if not waiter.counted:
            return
        waiter.counted = False
        self.calls -= 1
        self._of[waiter.key_id] -= 1
        if not self._of[waiter.key_id]:
            del self._of[waiter.key_id]

    def wake(self, account: Account) -> None:
        """Admit those who wait, in their order, until one of them still has to."""
        while account.waiting:
            waiter: _Waiter = account.waiting[0]
            if not waiter.future.done():
                try:
                    if self._take(waiter.call, waiter.ask) is not None:
                        return
                except GatewayError as refusal:
                    waiter.future.set_exception(refusal)
                else:
                    waiter.future.set_result(None)
            account.waiting.popleft()
        self._accounts.discard(account)

    def wake_all(self) -> None:
        """A new day or a changed limit may let anybody go on."""
        for account in tuple(self._accounts):
            self.wake(account)

    def refuse(self, key_id: str, cause: GatewayError) -> None:
        """End the wait of every call of a key."""
        for account in tuple(self._accounts):
            for waiter in account.waiting:
                if waiter.key_id == key_id and not waiter.future.done():
                    waiter.future.set_exception(cause)


def _held(message: str) -> CapacityError:
    return RateLimitExceeded(message, retry_after=1.0, limit="daily_tokens")
