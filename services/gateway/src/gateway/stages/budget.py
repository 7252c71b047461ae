"""Stage 2: may this caller spend this much.

Every limit is looked at before any is taken: requests a minute of the address and of the key, tokens a minute,
concurrency, the key's day, its organisation's day. All are taken or none. What a call takes from a day is a *hold*: an
upper bound of its tokens, so that what is settled can never exceed the quota. When only other calls' holds stand in the
way, the call waits in line for them (first come, first served) instead of being refused.

All state is in memory and has one owner, the event loop; the decision is synchronous. What a call holds is kept in the
journal before it goes on, so that a crash cannot forget it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from gateway import limits_told
from gateway.account import Account, Days
from gateway.call import Call, Caller, Hold, Outcome
from gateway.errors import GatewayError, InvalidApiKey, LedgerUnavailable
from gateway.gcra import Addresses
from gateway.hold_line import HoldLine
from gateway.journal import Held
from gateway.keyring import Keyring
from gateway.settings import Settings
from gateway.stages.estimate import Ask, Outputs, ask
from gateway.store import Database, Store, StoreUnavailable, reports


class Registry(Protocol):
    """What the budget wants to know about models."""

    def max_model_len(self, model: str) -> int | None:
        """The longest context of `model` in tokens, None if unknown."""
        ...

    def serves(self, model: str) -> bool:
        """Whether a configured engine serves `model`."""
        ...


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
        # Attributes of our own: asking pydantic's object costs several times as much.
        self._hold_seconds = settings.hold_seconds
        self._outputs = Outputs(settings.default_output_tokens, settings.max_output_tokens)
        self._store = store
        self._registry = registry
        self._keyring = keyring
        self._now = monotonic
        self._clock = clock
        self.days = Days(settings.quota_timezone, clock)
        self._keys: dict[str, Account] = {}
        self._organisations: dict[str, Account] = {}
        self._addresses = Addresses(settings.ip_requests_per_minute) if settings.ip_requests_per_minute else None
        self._deleted: set[str] = set()  # keys that are no more, until their accounts can be forgotten
        self._line = HoldLine(self._take, settings.queue_calls, settings.queue_seconds)
        self.live: dict[str, Call] = {}
        """Every call that holds something, by request id."""
        keyring.on_revoked = self.revoke

    # Reading

    @property
    def waiting(self) -> int:
        """Calls that wait for other calls' holds."""
        return self._line.calls

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
        refusals = limits_told.refusals(call, caller.limits, account, self._addresses, 0, self._now())
        quota = caller.limits.daily_tokens
        if quota and call.endpoint.metered and self.days.of(account).used >= quota:
            refusals.append(limits_told.exhausted("daily_tokens", 0, self.days))
        if refusals:
            call.limit_lines = self.headers(call)
            raise limits_told.longest(refusals)

    def _take(self, call: Call, wanted: Ask, first: bool = False) -> Account | None:
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
        if account.revoked is not None and call.started < account.revoked[0]:
            raise account.revoked[1]
        day = self.days.of(account)
        refusals = limits_told.refusals(call, caller.limits, account, self._addresses, wanted.likely, now)
        organisation = self.organisation(caller.organisation) if caller.organisation is not None else None
        metered = call.endpoint.metered
        tokens = wanted.most if metered else 0
        blocked: Account | None = None
        if metered and caller.limits.daily_tokens:
            left = caller.limits.daily_tokens - day.used
            if left < wanted.least:
                refusals.append(limits_told.exhausted("daily_tokens", left, self.days))
            elif left - day.held < (left if left < wanted.most else wanted.most) or (first and account.waiting):
                blocked = account  # nobody overtakes those who wait
            if left < tokens:
                tokens = left
        if metered and organisation is not None and caller.organisation_daily_tokens:
            shared = organisation.day(day.name)
            left = caller.organisation_daily_tokens - shared.used
            if left < wanted.least:
                refusals.append(limits_told.exhausted("organisation_daily_tokens", left, self.days))
            elif left - shared.held < min(wanted.most, left) or (first and organisation.waiting):
                blocked = blocked or organisation
            tokens = min(tokens, left)
        if refusals:
            raise limits_told.longest(refusals)
        if blocked is not None:
            return blocked
        if metered and call.request is not None:
            call.request.output_limit = wanted.limit_for(tokens)
        if self._addresses is not None:
            self._addresses.take(call.ip, now)
        if account.requests_rate is not None:
            account.requests_tat = account.requests_rate.take(account.requests_tat, now)
        charged = 0
        if account.tokens_rate is not None and metered:
            limit = account.tokens_rate.limit
            charged = wanted.likely if wanted.likely < limit else limit
            account.tokens_tat = account.tokens_rate.take(account.tokens_tat, now, charged)
        account.live[call.request_id] = charged
        day.held += tokens
        if organisation is not None:
            organisation.day(day.name).held += tokens
        call.caller = caller
        call.hold = Hold(call.request_id, caller.key_id, tokens, day.name, self._clock() + self._hold_seconds)
        self.live[call.request_id] = call
        return None

    def scarce(self, call: Call) -> bool:
        """Whether what is left of the day is so little that the exact length of the prompt matters."""
        caller, request = call.caller, call.request
        assert caller is not None
        assert request is not None
        if not call.endpoint.metered:
            return False
        output = self._outputs.default_output_tokens if request.max_output is None else request.max_output
        most = request.prompt_bound + request.n * output
        limit = caller.limits.daily_tokens
        if limit and limit - self.days.of(self._account(caller)).used < most:
            return True
        limit = caller.organisation_daily_tokens
        if not limit or caller.organisation is None:
            return False
        return limit - self.days.of(self.organisation(caller.organisation)).used < most

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
        wanted = ask(request, call.caller, self._outputs, self._registry.max_model_len(request.model))
        try:
            blocked = self._take(call, wanted, True)
            if blocked is not None:
                await self._line.wait(call, wanted, blocked)
        finally:
            call.limit_lines = self.headers(call)
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

    # Giving back

    def release(self, call: Call) -> None:
        """Give back what `call` holds and count what it used. Idempotent."""
        if call.hold is not None:
            self._give_back(call, call.usage.total)
        elif not call.counted:
            self._count(call)

    def _count(self, call: Call) -> None:
        """One more request of today, as the ledger has it: the call ended before it held anything, and not by a
        refusal."""
        caller = call.caller
        call.counted = True
        if caller is None or call.outcome is Outcome.REFUSED:
            return
        if (account := self._keys.get(caller.key_id)) is not None:  # None: the key was deleted meanwhile
            self.days.of(account).requests += 1
        if caller.organisation is not None:
            self.days.of(self.organisation(caller.organisation)).requests += 1

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
            self._line.wake(account)

    def tick(self) -> None:
        """Now and then: let waiting calls see a new day or a changed limit; end calls of keys that expired; forget
        what deleted keys have used."""
        for key_id in tuple(self._deleted):
            back = self._keyring.caller(key_id) is not None  # an older database was put in its place
            if back or self._keys[key_id].idle:
                self._deleted.discard(key_id)
                if not back:
                    del self._keys[key_id]
        self._line.wake_all()
        for call in tuple(self.live.values()):
            # As the key is now, not as it was when the call was admitted.
            caller = None if call.caller is None else self._keyring.caller(call.caller.key_id)
            if caller is not None and caller.expires_at is not None:
                problem = self._keyring.problem(caller)
                if problem is not None:
                    call.abort(problem)

    def revoke(self, key_id: str, cause: GatewayError) -> None:
        """End every running call of a key, or of a secret, that is no longer valid; waiting ones are refused, and so
        are those that are known but hold nothing yet."""
        account = self._keys.get(key_id)
        if account is None:
            return
        account.revoked = (time.perf_counter(), cause)
        if self._keyring.caller(key_id) is None:
            self._deleted.add(key_id)
        for request_id in tuple(account.live):
            if (call := self.live.get(request_id)) is not None:
                call.abort(cause)
        self._line.refuse(key_id, cause)

    # Telling

    def headers(self, call: Call) -> bytes:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` where a limit holds, as header lines; resets in whole
        seconds."""
        caller = call.caller
        if caller is None:
            return b""
        limits = caller.limits
        if not (limits.requests_per_minute or limits.tokens_per_minute or limits.daily_tokens):
            return b""
        return limits_told.lines(limits, self._account(caller), self.days, self._now())
