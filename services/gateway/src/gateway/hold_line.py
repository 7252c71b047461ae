"""Calls that wait because only other calls' holds stand between them and a quota: first come, first served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.account import Account
from gateway.call import Call
from gateway.errors import CapacityError, GatewayError, RateLimitExceeded
from gateway.stages.estimate import Ask

Take = Callable[[Call, Ask], Account | None]
"""Takes every limit for a call, raises its refusal, or returns the account that it still has to wait for."""


class _Waiter:
    __slots__ = ("ask", "call", "future")

    def __init__(self, call: Call, wanted: Ask, future: asyncio.Future[None]) -> None:
        self.call = call
        self.ask = wanted
        self.future = future


class HoldLine:
    """One line for each account (`account.waiting`). At most `most` calls wait, for at most `seconds`."""

    def __init__(self, take: Take, most: int, seconds: float) -> None:
        self._take = take
        self._most = most
        self._seconds = seconds
        self._accounts: set[Account] = set()
        self.calls = 0
        """Calls that wait."""

    async def wait(self, call: Call, wanted: Ask, account: Account) -> None:
        """Return when every limit has been taken for `call`. Raises the refusal of a limit, or that of the line."""
        if self.calls >= self._most:
            raise _held("Too many calls wait for this quota.")
        waiter = _Waiter(call, wanted, asyncio.get_running_loop().create_future())
        account.waiting.append(waiter)
        self._accounts.add(account)
        self.calls += 1
        try:
            async with asyncio.timeout(self._seconds):
                await waiter.future
        except TimeoutError:
            if call.hold is None:  # else it was admitted in the very last moment
                raise _held("The tokens left today are held by other calls.") from None
        finally:
            self.calls -= 1
            if waiter in account.waiting:
                account.waiting.remove(waiter)
                self.wake(account)

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
                caller = waiter.call.caller
                if caller is not None and caller.key_id == key_id and not waiter.future.done():
                    waiter.future.set_exception(cause)


def _held(message: str) -> CapacityError:
    return RateLimitExceeded(message, retry_after=1.0, limit="daily_tokens")
