"""What a caller is told about its limits: why it is refused and for how long, and what is left, as headers."""

from __future__ import annotations

from gateway.account import Account, Days
from gateway.call import Call, Limits
from gateway.errors import CapacityError, ConcurrencyExceeded, GatewayError, QuotaExhausted, RateLimitExceeded
from gateway.gcra import Addresses, Rate


def refusals(
    call: Call, limits: Limits, account: Account, addresses: Addresses | None, tokens: int, now: float
) -> list[GatewayError]:
    """What refuses a call of `tokens` now, apart from the days. `now` is monotonic."""
    found: list[GatewayError] = []
    if addresses is not None and (wait := addresses.wait(call.ip, now)):
        what = "requests per minute of this address"
        found.append(_too_fast(what, "ip_requests_per_minute", addresses.rate, wait))
    rate = account.requests_rate
    if rate is not None and account.requests_tat > now and (wait := rate.wait(account.requests_tat, now)):
        found.append(_too_fast("requests per minute", "requests_per_minute", rate, wait))
    rate = account.tokens_rate
    if (
        rate is not None
        and account.tokens_tat > now  # else it is full
        and call.endpoint.metered
        and (wait := rate.wait(account.tokens_tat, now, tokens or 1))
    ):
        found.append(_too_fast("tokens per minute", "tokens_per_minute", rate, wait))
    concurrency = limits.concurrency
    if concurrency and len(account.live) >= concurrency:
        message = f"This key has {concurrency} calls running, its limit (concurrency)."
        found.append(ConcurrencyExceeded(message, retry_after=1.0, limit="concurrency"))
    return found


def _too_fast(what: str, limit: str, rate: Rate, wait: float) -> CapacityError:
    return RateLimitExceeded(f"The limit of {rate.limit} {what} is reached.", retry_after=wait, limit=limit)


def exhausted(limit: str, left: int, days: Days) -> QuotaExhausted:
    """A day's tokens are used up, or fewer than a call may need."""
    whose = "organisation" if limit.startswith("organisation") else "key"
    told = (
        f"The daily tokens of this {whose} are used up."
        if left <= 0
        else f"The {left} tokens that this {whose} has left today are fewer than this call may need."
    )
    return QuotaExhausted(told, retry_after=days.seconds_left(), limit=limit)


def longest(refusals: list[GatewayError]) -> GatewayError:
    """The refusal with the longest wait. The list is emptied: an error must not find itself in its own traceback."""
    found = max(refusals, key=lambda refusal: refusal.retry_after or 0.0)
    refusals.clear()
    return found


_REQUESTS, _TOKENS = (
    b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%d\r\n" % (what, what, what)
    for what in (b"requests", b"tokens")
)


def lines(limits: Limits, account: Account, days: Days, now: float) -> bytes:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` where a limit holds, as header lines; resets in whole
    seconds.

    Of the tokens a minute and the tokens of the day the one with less left is told.
    """
    told = b""
    rate = account.requests_rate
    if rate is not None:
        tat = account.requests_tat
        told = _REQUESTS % (rate.limit, rate.remaining(tat, now), _whole(tat - now))
    left = limit = reset = None
    rate = account.tokens_rate
    if rate is not None:
        left, limit, reset = rate.remaining(account.tokens_tat, now), rate.limit, account.tokens_tat - now
    if limits.daily_tokens:
        day = days.of(account)
        today = limits.daily_tokens - day.used - day.held
        if left is None or today < left:
            left, limit, reset = today if today > 0 else 0, limits.daily_tokens, days.seconds_left()
    if reset is not None:
        told += _TOKENS % (limit, left, _whole(reset))
    return told


def _whole(seconds: float) -> int:
    return int(seconds + 0.999) if seconds > 0 else 0
