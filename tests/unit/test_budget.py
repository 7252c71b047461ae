"""May this caller spend this much: every limit, all or none, and holds that neither leak nor run dry."""

import asyncio

import pytest
from tests.doubles.stages import SECRET, Clock, Stages, settings_for, stages

from gateway.call import Outcome, Usage
from gateway.errors import (
    ConcurrencyExceeded,
    LedgerUnavailable,
    QuotaExhausted,
    RateLimitExceeded,
)
from gateway.store import accounts


async def settle_down(turns: int = 5) -> None:
    """Let tasks that can run do so."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_concurrency_is_taken_and_given_back(tmp_path):
    async with stages(tmp_path, DEFAULT_CONCURRENCY=2) as made:
        calls = [made.call() for _ in range(3)]
        assert await made.budget.hold(calls[0])
        assert await made.budget.hold(calls[1])
        with pytest.raises(ConcurrencyExceeded) as refusal:
            await made.budget.hold(calls[2])
        assert refusal.value.retry_after >= 1
        await made.end(calls[0])
        made.close(calls[0])  # a second time changes nothing
        assert await made.budget.hold(calls[2])
        with pytest.raises(ConcurrencyExceeded):
            await made.budget.hold(made.call())


async def test_a_refused_call_takes_nothing_from_any_limit(tmp_path):
    clock = Clock()
    async with stages(
        tmp_path,
        clock=clock,
        DEFAULT_REQUESTS_PER_MINUTE=2,
        DEFAULT_TOKENS_PER_MINUTE=1000,
        DEFAULT_CONCURRENCY=1,
        DEFAULT_DAILY_TOKENS=10_000,
        IP_REQUESTS_PER_MINUTE=100,
    ) as made:
        first = made.call()
        await made.budget.hold(first)
        before = made.budget.headers(first)
        for _ in range(20):
            refused = made.call()
            with pytest.raises(ConcurrencyExceeded):
                await made.budget.hold(refused)
            made.close(refused)
        assert made.budget.headers(first) == before
        await made.end(first)
        second = made.call()
        assert await made.budget.hold(second)  # the second of two requests a minute is still there
        made.close(second)
        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call())
        assert refusal.value.limit == "requests_per_minute"
        assert refusal.value.retry_after == pytest.approx(30.0)
        clock.now += refusal.value.retry_after
        assert await made.budget.hold(made.call())


async def test_rate_limit_of_an_address_holds_over_keys(tmp_path):
    async with stages(tmp_path, clock=Clock(), IP_REQUESTS_PER_MINUTE=1) as made:
        assert await made.budget.hold(made.call(ip="192.0.2.1"))
        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call(ip="192.0.2.1"))
        assert refusal.value.limit == "ip_requests_per_minute"
        assert await made.budget.hold(made.call(ip="192.0.2.2"))


async def test_tokens_a_minute_are_charged_as_used(tmp_path):
    clock = Clock()
    async with stages(tmp_path, clock=clock, DEFAULT_TOKENS_PER_MINUTE=1000) as made:
        for _ in range(4):  # 900 are estimated each time, 25 are used
            call = made.call(prompt=400, output=800)
            await made.budget.hold(call)
            await made.end(call, 10, 15)
        call = made.call(prompt=400, output=800)
        assert await made.budget.hold(call)  # 100 used, 900 wanted of 1000
        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call(prompt=40, output=90))
        assert refusal.value.limit == "tokens_per_minute"
        assert refusal.value.retry_after == pytest.approx(6.0)
        await made.end(call, 10, 15)
        assert await made.budget.hold(made.call(prompt=40, output=90))  # the estimate was given back


async def test_a_larger_use_than_estimated_is_paid_by_waiting(tmp_path):
    clock = Clock()
    async with stages(tmp_path, clock=clock, DEFAULT_TOKENS_PER_MINUTE=600) as made:
        call = made.call(prompt=40, output=10)
        await made.budget.hold(call)
        await made.end(call, 300, 900)  # twice the minute
        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call(prompt=40, output=10))
        assert refusal.value.retry_after == pytest.approx(62.0)  # the debt of a minute, and 20 tokens


async def test_the_settled_sum_never_exceeds_the_quota_and_most_of_it_is_usable(tmp_path):
    """200 clients at once on one key: each call may use all that it holds."""
    quota = 10_000
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=quota, QUEUE_CALLS=500) as made:
        settled = 0
        advice: set[str] = set()

        async def client(number: int) -> None:
            nonlocal settled
            while True:
                call = made.call(prompt=60, output=40 + number % 50)
                try:
                    await made.budget.hold(call)
                except QuotaExhausted as refusal:
                    advice.add(refusal.headers()["x-should-retry"])
                    made.close(call)
                    return
                await settle_down(number % 7)
                output = call.request.output_limit or call.request.max_output
                await made.end(call, 30 + number % 31, output)
                settled += call.usage.total

        await asyncio.gather(*(client(number) for number in range(200)))
        assert 9_000 <= settled <= quota
        assert advice == {"false"}
        day = made.budget.account(made.call().caller.key_id).day(made.budget.days.today())
        assert (day.used, day.held) == (settled, 0)
        assert made.rows("SELECT SUM(prompt_tokens + completion_tokens) FROM usage_records")[0][0] == settled
        assert made.rows("SELECT COUNT(*) FROM holds")[0][0] == 0
        assert made.budget.live == {}


async def test_cancelled_right_after_admission_gives_everything_back(tmp_path):
    async with stages(tmp_path, DEFAULT_CONCURRENCY=1, DEFAULT_DAILY_TOKENS=1000) as made:
        call = made.call()
        task = asyncio.create_task(made.budget.hold(call))
        await asyncio.sleep(0)
        assert call.hold is not None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        call.outcome = Outcome.CANCELLED
        made.close(call)
        again = made.call()
        assert await made.budget.hold(again)
        await made.end(again)
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        assert [row[0] for row in made.rows("SELECT outcome FROM usage_records ORDER BY id")] == ["cancelled", "ok"]


async def test_an_organisations_quota_holds_over_its_keys(tmp_path):
    async with stages(tmp_path) as made:
        secrets = []
        for name in ("a", "b"):
            _, secret = await made.store.change(
                lambda db, name=name: accounts.create(db, {"name": name, "organisation": "lab"}, "test")
            )
            secrets.append(secret)
        await made.store.change(lambda db: accounts.set_organisation(db, "lab", 1000, "test"))
        first = made.call(secret=secrets[0], prompt=100, output=700)
        await made.budget.hold(first)
        await made.end(first, 100, 700)
        other = made.call(secret=secrets[1], prompt=100, output=700)
        await made.budget.hold(other)
        assert other.request.output_limit == 100
        await made.end(other, 100, 100)
        with pytest.raises(QuotaExhausted) as refusal:
            await made.budget.hold(made.call(secret=secrets[1]))
        assert refusal.value.limit == "organisation_daily_tokens"
        assert await made.budget.hold(made.call(secret=SECRET))  # of no organisation


async def test_used_request_ids_are_told_and_take_nothing(tmp_path):
    async with stages(tmp_path, DEFAULT_REQUESTS_PER_MINUTE=3, DEFAULT_DAILY_TOKENS=1000) as made:
        first = made.call(request_id="chosen-by-caller")
        assert await made.budget.hold(first)
        account = made.budget.account(first.caller.key_id)
        before = (account.requests_tat, account.day(made.budget.days.today()).held)
        twin = made.call(request_id="chosen-by-caller")
        assert await made.budget.hold(twin) is False  # under way
        assert twin.hold is None
        await made.end(first)
        twin = made.call(request_id="chosen-by-caller")
        assert await made.budget.hold(twin) is False  # ended not long ago
        assert (account.requests_tat, before[1]) == pytest.approx((before[0], 150))
        assert account.day(made.budget.days.today()).held == 0


async def test_an_id_of_an_earlier_life_is_extended_in_the_ledger(tmp_path):
    """Nothing is dropped and nothing charged twice, whichever way the second call ends."""
    async with stages(tmp_path) as made:
        call = made.call(request_id="chosen-by-caller")
        await made.budget.hold(call)
        await made.end(call, 1, 1)
    async with stages(tmp_path) as made:
        call = made.call(request_id="chosen-by-caller")
        await made.budget.hold(call)
        await made.end(call, 2, 2)
    lost = Stages(settings_for(tmp_path))
    await lost.start()
    call = lost.call(request_id="chosen-by-caller")
    await lost.budget.hold(call)
    call.note(Usage(4, 4, 0, known=True))
    await lost.stop()  # as if it had been killed: the journal still has the call
    async with stages(tmp_path) as made:
        assert made.started.lost == 1
        rows = made.rows("SELECT request_id, prompt_tokens, outcome FROM usage_records ORDER BY id")
        assert [row[1:] for row in rows] == [(1, "ok"), (2, "ok"), (4, "lost")]
        assert len({row[0] for row in rows}) == 3
        assert all(row[0].startswith("chosen-by-caller") for row in rows)


async def test_headers_tell_the_tighter_limit(tmp_path):
    async with stages(
        tmp_path,
        clock=Clock(),
        DEFAULT_REQUESTS_PER_MINUTE=60,
        DEFAULT_TOKENS_PER_MINUTE=6000,
        DEFAULT_DAILY_TOKENS=500,
    ) as made:
        call = made.call(prompt=100, output=100)
        await made.budget.hold(call)
        told = dict(line.split(": ") for line in call.limit_lines.decode().split("\r\n")[:-1])
        assert told["x-ratelimit-limit-requests"] == "60"
        assert told["x-ratelimit-remaining-requests"] == "59"
        assert told["x-ratelimit-reset-requests"] == "1"
        assert told["x-ratelimit-limit-tokens"] == "500"
        assert told["x-ratelimit-remaining-tokens"] == "300"


async def test_without_a_healthy_ledger_nothing_is_admitted(tmp_path):
    async with stages(tmp_path) as made:
        made.store._writer.healthy = False
        made.store._writer._next_try = float("inf")
        with pytest.raises(LedgerUnavailable):
            await made.budget.hold(made.call())
        made.store._writer._next_try = 0.0


async def test_unmetered_calls_take_requests_but_no_tokens(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=10, DEFAULT_REQUESTS_PER_MINUTE=1) as made:
        call = made.call(path="/v1/tokenize", prompt=5000, output=None)
        assert await made.budget.hold(call)
        assert call.hold.tokens == 0
        with pytest.raises(RateLimitExceeded):
            await made.budget.hold(made.call(path="/v1/tokenize"))


async def test_a_call_leaves_no_reference_cycle(tmp_path):
    """Neither an admitted nor a refused call needs the collector to go."""
    import gc
    import weakref

    async with stages(tmp_path, DEFAULT_CONCURRENCY=1, DEFAULT_DAILY_TOKENS=500) as made:
        gc.collect()
        gc.disable()
        try:
            kept = made.call()
            await made.budget.hold(kept)
            refused = made.call()
            watched = weakref.ref(refused.request) if hasattr(refused.request, "__weakref__") else None
            before = len(gc.get_objects())
            for _ in range(50):
                call = made.call()
                try:
                    await made.budget.hold(call)
                except ConcurrencyExceeded as error:
                    call.error = error
                made.close(call)
                call.error = None
                del call
            await made.end(kept)
            for _ in range(50):
                call = made.call()
                await made.budget.hold(call)
                await made.end(call, 1, 1)
                del call
            await settle_down()
            grown = len(gc.get_objects()) - before
            assert grown < 100, f"{grown} objects stayed after 100 calls"
            assert watched is None or watched() is not None
        finally:
            gc.enable()
