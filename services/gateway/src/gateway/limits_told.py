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
    if rate is not None and (wait := rate.wait(account.requests_tat, now)):
        found.append(_too_fast("requests per minute", "requests_per_minute", rate, wait))
    rate = account.tokens_rate
    if rate is not None and call.endpoint.metered and (wait := rate.wait(account.tokens_tat, now, tokens or 1)):
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


def headers(limits: Limits, account: Account, days: Days, now: float) -> dict[str, str]:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` where a limit holds; resets in whole seconds.

    Of the tokens a minute and the tokens of the day the one with less left is told.
    """
    found: dict[str, str] = {}
    rate = account.requests_rate
    if rate is not None:
        _tell(found, "requests", rate.limit, rate.remaining(account.requests_tat, now), account.requests_tat - now)
    tightest: tuple[int, int, float] | None = None
    rate = account.tokens_rate
    if rate is not None:
        tightest = (rate.remaining(account.tokens_tat, now), rate.limit, account.tokens_tat - now)
    if limits.daily_tokens:
        day = account.day(days.today())
        left = limits.daily_tokens - day.used - day.held
        if tightest is None or left < tightest[0]:
            tightest = (left if left > 0 else 0, limits.daily_tokens, days.seconds_left())
    if tightest is not None:
        _tell(found, "tokens", tightest[1], tightest[0], tightest[2])
    return found


def _tell(headers: dict[str, str], what: str, limit: int, remaining: int, reset: float) -> None:
    headers[f"x-ratelimit-limit-{what}"] = f"{limit}"
    headers[f"x-ratelimit-remaining-{what}"] = f"{remaining}"
    headers[f"x-ratelimit-reset-{what}"] = f"{int(reset + 0.999) if reset > 0 else 0}"
