"""Stage 2: may this caller spend this much.

Every limit is looked at before any is taken: requests a minute of the address and of the key, tokens a minute,
concurrency, the key's day, its organisation's day. All are taken or none. What a call takes from a day is a *hold*: an
upper bound of its tokens, so that what is settled can never exceed the quota. When only other calls' holds stand in the
way, the call waits in line for them (first come, first served) instead of being refused.

All state is in memory and has one owner, the event loop; the decision is synchronous. What a call holds is kept in the
journal before it goes on, so that a crash cannot forget it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from gateway.account import Account, Days
from gateway.call import Call, Caller, Hold, Outcome
from gateway.errors import (
    CapacityError,
    ConcurrencyExceeded,
    GatewayError,
    InvalidApiKey,
    LedgerUnavailable,
    QuotaExhausted,
    RateLimitExceeded,
)
from gateway.gcra import Rate, per_minute
from gateway.journal import Held
from gateway.keyring import Keyring
from gateway.settings import Settings
from gateway.stages.estimate import Ask, ask
from gateway.store import Database, Store, StoreUnavailable, reports

_MOST_ADDRESSES = 65_536


class Registry(Protocol):
    """What the budget wants to know about models."""

    def max_model_len(self, model: str) -> int | None:
        """The longest context of `model` in tokens, None if unknown."""
        ...

    def serves(self, model: str) -> bool:
        """Whether a configured engine serves `model`."""
        ...


class _Waiter:
    __slots__ = ("ask", "call", "future")

    def __init__(self, call: Call, wanted: Ask, future: asyncio.Future[None]) -> None:
        self.call = call
        self.ask = wanted
        self.future = future


class Budget:
    """Limits of all keys and organisations. Owned by the event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registry: Registry,
        keyring: Keyring,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._registry = registry
        self._keyring = keyring
        self._now = monotonic
        self._clock = clock
        self.days = Days(settings.quota_timezone, clock)
        self._keys: dict[str, Account] = {}
        self._organisations: dict[str, Account] = {}
        self._addresses: dict[str, float] = {}
        self._address_rate = per_minute(settings.ip_requests_per_minute) if settings.ip_requests_per_minute else None
        self._deleted: set[str] = set()  # keys that are no more, until their accounts can be forgotten
        self._waiting: set[Account] = set()
        self._waiters = 0
        self.live: dict[str, Call] = {}
        """Every call that holds something, by request id."""
        keyring.on_revoked = self.revoke

    # Reading

    @property
    def waiting(self) -> int:
        """Calls that wait for other calls' holds."""
        return self._waiters

    def account(self, key_id: str) -> Account:
        """The account of a key."""
        account = self._keys.get(key_id)
        if account is None:
            account = self._keys[key_id] = Account()
        return account

    def organisation(self, name: str) -> Account:
        """The account of an organisation."""
        account = self._organisations.get(name)
        if account is None:
            account = self._organisations[name] = Account()
        return account

    def caller(self, key_id: str) -> Caller | None:
        """The key as it is now, with its limits."""
        return self._keyring.caller(key_id)

    async def start(self) -> None:
        """Read what was used today; call it after the store's start and before the first call.

        And on the last days with calls, whichever they are: the clock may be wrong at the start and be set right later.
        """
        today = self.days.today()

        def read(database: Database) -> dict[str, list[tuple[str, str, int, int]]]:
            days = {today, *reports.last_days(database)}
            return {day: reports.day_totals(database, day) for day in sorted(days)}

        for day, totals in (await self._store.read(read)).items():
            self.load(day, totals)

    def load(self, today: str, totals: list[tuple[str, str, int, int]]) -> None:
        """Take over the totals of a day, as `(key id, organisation or "", tokens, requests)`."""
        for key_id, organisation, tokens, requests in totals:
            accounts = [self.account(key_id)] + ([self.organisation(organisation)] if organisation else [])
            for account in accounts:
                day = account.day(today)
                day.used += tokens
                day.requests += requests

    def _account(self, caller: Caller) -> Account:
        account = self._keys.get(caller.key_id)
        if account is None:
            account = self._keys[caller.key_id] = Account()
        if account.caller is not caller:
            account.bind(caller)
        return account

    # Deciding

    def admit(self, call: Call) -> None:
        """Refuse early what would be refused anyway, before the body is read; nothing is taken."""
        caller = call.caller
        assert caller is not None
        account = self._account(caller)
        refusals = self._refusals(call, caller, account, 0, self._now())
        quota = caller.limits.daily_tokens
        if quota and call.endpoint.metered and account.day(self.days.today()).used >= quota:
            refusals = [*refusals, self._exhausted("daily_tokens", 0)]
        if refusals:
            call.limit_headers = self.headers(call)
            raise _longest(refusals)

    def _refusals(self, call: Call, caller: Caller, account: Account, tokens: int, now: float) -> list[GatewayError]:
        """What refuses now, apart from the days."""
        found: list[GatewayError] = []
        rate = self._address_rate
        if rate is not None and (wait := rate.wait(self._addresses.get(call.ip, 0.0), now)):
            found.append(_too_fast("requests per minute of this address", "ip_requests_per_minute", rate, wait))
        rate = account.requests_rate
        if rate is not None and (wait := rate.wait(account.requests_tat, now)):
            found.append(_too_fast("requests per minute", "requests_per_minute", rate, wait))
        rate = account.tokens_rate
        if rate is not None and call.endpoint.metered and (wait := rate.wait(account.tokens_tat, now, tokens or 1)):
            found.append(_too_fast("tokens per minute", "tokens_per_minute", rate, wait))
        concurrency = caller.limits.concurrency
        if concurrency and len(account.live) >= concurrency:
            found.append(
                ConcurrencyExceeded(
                    f"This key has {concurrency} calls running, its limit (concurrency).",
                    retry_after=1.0,
                    limit="concurrency",
                )
            )
        return found

    def _exhausted(self, limit: str, left: int) -> QuotaExhausted:
        whose = "organisation" if limit.startswith("organisation") else "key"
        told = (
            f"The daily tokens of this {whose} are used up."
            if left <= 0
            else f"The {left} tokens that this {whose} has left today are fewer than this call may need."
        )
        return QuotaExhausted(told, retry_after=self.days.seconds_left(), limit=limit)

    def _take(self, call: Call, wanted: Ask, *, first: bool) -> Account | None:
        """Take all limits and return None, or raise the refusal with the longest wait, or return the account in which
        only other calls' holds stand in the way."""
        assert call.caller is not None
        caller = self._keyring.caller(call.caller.key_id)
        if caller is None:
            raise InvalidApiKey("This key is not valid.")
        if caller.disabled or caller.expires_at is not None:
            self._raise_problem(caller)
        if not self._store.healthy:
            raise LedgerUnavailable("Usage cannot be recorded at the moment.")
        now = self._now()
        account = self._account(caller)
        day = account.day(self.days.today())
        refusals = self._refusals(call, caller, account, wanted.likely, now)
        organisation = self.organisation(caller.organisation) if caller.organisation is not None else None
        metered = call.endpoint.metered
        tokens = wanted.most if metered else 0
        blocked: Account | None = None
        if metered and caller.limits.daily_tokens:
            left = caller.limits.daily_tokens - day.used
            if left < wanted.least:
                refusals.append(self._exhausted("daily_tokens", left))
            elif left - day.held < min(wanted.most, left) or (first and account.waiting):
                blocked = account  # nobody overtakes those who wait
            tokens = min(tokens, left)
        if metered and organisation is not None and caller.organisation_daily_tokens:
            shared = organisation.day(day.name)
            left = caller.organisation_daily_tokens - shared.used
            if left < wanted.least:
                refusals.append(self._exhausted("organisation_daily_tokens", left))
            elif left - shared.held < min(wanted.most, left) or (first and organisation.waiting):
                blocked = blocked or organisation
            tokens = min(tokens, left)
        if refusals:
            raise _longest(refusals)
        if blocked is not None:
            return blocked
        if metered and call.request is not None:
            call.request.output_limit = wanted.limit_for(tokens)
        if self._address_rate is not None:
            self._remember(call.ip, self._address_rate.take(self._addresses.get(call.ip, 0.0), now), now)
        if account.requests_rate is not None:
            account.requests_tat = account.requests_rate.take(account.requests_tat, now)
        charged = 0
        if account.tokens_rate is not None and metered:
            charged = min(wanted.likely, account.tokens_rate.limit)
            account.tokens_tat = account.tokens_rate.take(account.tokens_tat, now, charged)
        account.live[call.request_id] = charged
        day.held += tokens
        if organisation is not None:
            organisation.day(day.name).held += tokens
        call.caller = caller
        call.hold = Hold(call.request_id, caller.key_id, tokens, day.name, self._clock() + self._settings.hold_seconds)
        self.live[call.request_id] = call
        return None

    def scarce(self, call: Call) -> bool:
        """Whether what is left of the day is so little that the exact length of the prompt matters."""
        caller, request = call.caller, call.request
        if caller is None or request is None or not call.endpoint.metered:
            return False
        limits = [(caller.limits.daily_tokens, self._account(caller))]
        if caller.organisation is not None:
            limits.append((caller.organisation_daily_tokens, self.organisation(caller.organisation)))
        output = self._settings.default_output_tokens if request.max_output is None else request.max_output
        most = request.prompt_bound + request.n * output
        today = self.days.today()
        return any(limit and limit - account.day(today).used < most for limit, account in limits)

    def _raise_problem(self, caller: Caller) -> None:
        problem = self._keyring.problem(caller)
        if problem is not None:
            raise problem

    async def hold(self, call: Call) -> bool:
        """Take every limit for `call` and keep it in the journal.

        Sets `call.hold`, `call.note` and `call.request.output_limit`. False: this request id was used before, nothing
        was taken. Raises the refusal of a limit, or `LedgerUnavailable`. If it is cancelled or fails after taking,
        `release` gives everything back.
        """
        request = call.request
        assert request is not None
        if call.request_id in self.live or self._store.knows(call.request_id):
            return False
        wanted = ask(request, call.caller, self._settings, self._registry.max_model_len(request.model))
        try:
            blocked = self._take(call, wanted, first=True)
            if blocked is not None:
                await self._wait(call, wanted, blocked)
        finally:
            call.limit_headers = self.headers(call)
        hold = call.hold
        caller = call.caller
        assert hold is not None
        assert caller is not None
        try:
            slot = self._store.hold(
                Held(
                    hold.request_id,
                    hold.key_id,
                    caller.organisation,
                    request.model if self._registry.serves(request.model) else "other",
                    call.endpoint.name,
                    hold.tokens,
                    hold.day,
                    request.stream,
                    call.started_at,
                    None if call.trace is None else call.trace.trace_id,
                )
            )
        except StoreUnavailable:
            raise LedgerUnavailable("Usage cannot be recorded at the moment.") from None
        hold.slot = slot
        call.note = slot.note
        return True

    # Waiting for others' holds

    async def _wait(self, call: Call, wanted: Ask, account: Account) -> None:
        if self._waiters >= self._settings.queue_calls:
            raise _held("Too many calls wait for this quota.")
        waiter = _Waiter(call, wanted, asyncio.get_running_loop().create_future())
        account.waiting.append(waiter)
        self._waiting.add(account)
        self._waiters += 1
        try:
            async with asyncio.timeout(self._settings.queue_seconds):
                await waiter.future
        except TimeoutError:
            if call.hold is None:  # else it was admitted in the very last moment
                raise _held("The tokens left today are held by other calls.") from None
        finally:
            self._waiters -= 1
            if waiter in account.waiting:
                account.waiting.remove(waiter)
                self._wake(account)

    def _wake(self, account: Account) -> None:
        """Admit those who wait, in their order, until one of them still has to."""
        while account.waiting:
            waiter: _Waiter = account.waiting[0]
            if not waiter.future.done():
                try:
                    if self._take(waiter.call, waiter.ask, first=False) is not None:
                        return
                except GatewayError as refusal:
                    waiter.future.set_exception(refusal)
                else:
                    waiter.future.set_result(None)
            account.waiting.popleft()
        self._waiting.discard(account)

    # Giving back

    def release(self, call: Call) -> None:
        """Give back what `call` holds and count what it used. Idempotent."""
        if call.hold is not None:
            self._give_back(call, call.usage.total)

    def _give_back(self, call: Call, used: int | None) -> None:
        """End a hold; `used` None: the call never was."""
        hold = call.hold
        caller = call.caller
        if hold is None or caller is None or self.live.pop(hold.request_id, None) is None:
            return
        account = self.account(caller.key_id)
        charged = account.live.pop(hold.request_id)
        rate = account.tokens_rate
        if rate is not None and call.endpoint.metered:
            more = (used or 0) - charged
            if more <= 0:
                account.tokens_tat = rate.give_back(account.tokens_tat, -more)
            else:
                account.tokens_tat = rate.take(account.tokens_tat, self._now(), more)
        if used is None and account.requests_rate is not None:
            account.requests_tat = account.requests_rate.give_back(account.requests_tat, 1)
        self._return(account, call, hold, used)
        if caller.organisation is not None:
            self._return(self.organisation(caller.organisation), call, hold, used)
        if used is None:
            call.hold = None

    def _return(self, account: Account, call: Call, hold: Hold, used: int | None) -> None:
        day = account.day(hold.day)
        day.held -= hold.tokens
        if used is not None:
            day.used += used
            day.requests += call.outcome is not Outcome.REFUSED
        if account.waiting:
            self._wake(account)

    def tick(self) -> None:
        """Now and then: let waiting calls see a new day or a changed limit; end calls of keys that expired; forget
        what deleted keys have used."""
        for key_id in tuple(self._deleted):
            back = self._keyring.caller(key_id) is not None  # an older database was put in its place
            if back or self._keys[key_id].idle:
                self._deleted.discard(key_id)
                if not back:
                    del self._keys[key_id]
        for account in tuple(self._waiting):
            self._wake(account)
        for call in tuple(self.live.values()):
            caller = call.caller
            if caller is not None and caller.expires_at is not None:
                problem = self._keyring.problem(caller)
                if problem is not None:
                    call.abort(problem)

    def revoke(self, key_id: str, cause: GatewayError) -> None:
        """End every running call of a key that is no longer valid; waiting ones are refused."""
        account = self._keys.get(key_id)
        if account is None:
            return
        if self._keyring.caller(key_id) is None:
            self._deleted.add(key_id)
        for request_id in tuple(account.live):
            if (call := self.live.get(request_id)) is not None:
                call.abort(cause)
        for waiting in tuple(self._waiting):
            for waiter in waiting.waiting:
                caller = waiter.call.caller
                if caller is not None and caller.key_id == key_id and not waiter.future.done():
                    waiter.future.set_exception(cause)

    def _remember(self, ip: str, tat: float, now: float) -> None:
        if len(self._addresses) >= _MOST_ADDRESSES and ip not in self._addresses:
            self._addresses = {known: t for known, t in self._addresses.items() if t > now}
            while len(self._addresses) >= _MOST_ADDRESSES:
                self._addresses.pop(next(iter(self._addresses)))  # the one that was first seen longest ago
        self._addresses[ip] = tat

    # Telling

    def headers(self, call: Call) -> dict[str, str]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` where a limit holds; resets in whole seconds."""
        caller = call.caller
        if caller is None:
            return {}
        limits = caller.limits
        if not (limits.requests_per_minute or limits.tokens_per_minute or limits.daily_tokens):
            return {}
        account = self._account(caller)
        now = self._now()
        found: dict[str, str] = {}
        rate = account.requests_rate
        if rate is not None:
            _tell(found, "requests", rate.limit, rate.remaining(account.requests_tat, now), account.requests_tat - now)
        tightest: tuple[int, int, float] | None = None
        rate = account.tokens_rate
        if rate is not None:
            tightest = (rate.remaining(account.tokens_tat, now), rate.limit, account.tokens_tat - now)
        if limits.daily_tokens:
            day = account.day(self.days.today())
            left = max(0, limits.daily_tokens - day.used - day.held)
            if tightest is None or left < tightest[0]:
                tightest = (left, limits.daily_tokens, self.days.seconds_left())
        if tightest is not None:
            _tell(found, "tokens", tightest[1], tightest[0], tightest[2])
        return found


def _tell(headers: dict[str, str], what: str, limit: int, remaining: int, reset: float) -> None:
    headers[f"x-ratelimit-limit-{what}"] = str(limit)
    headers[f"x-ratelimit-remaining-{what}"] = str(remaining)
    headers[f"x-ratelimit-reset-{what}"] = str(max(0, int(reset + 0.999)))


def _longest(refusals: list[GatewayError]) -> GatewayError:
    """The refusal with the longest wait. The list is emptied: an error must not find itself in its own traceback."""
    longest = max(refusals, key=lambda refusal: refusal.retry_after or 0.0)
    refusals.clear()
    return longest


def _too_fast(what: str, limit: str, rate: Rate, wait: float) -> CapacityError:
    return RateLimitExceeded(f"The limit of {rate.limit} {what} is reached.", retry_after=wait, limit=limit)


def _held(message: str) -> CapacityError:
    return RateLimitExceeded(message, retry_after=1.0, limit="daily_tokens")
