"""Limits over time: calls that wait for others' holds, days that turn, keys and limits that change meanwhile."""

import asyncio
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from tests.doubles.stages import Clock, stages

from gateway.errors import (
    ConcurrencyExceeded,
    GatewayError,
    InvalidApiKey,
    KeyDisabled,
    QuotaExhausted,
    RateLimitExceeded,
)
from gateway.store import accounts


async def waiting(made, count: int) -> None:
    """Wait until `count` calls wait for others' holds."""
    async with asyncio.timeout(5):
        while made.budget.waiting != count:
            await asyncio.sleep(0.001)


async def test_near_the_end_of_the_day_the_output_is_limited_to_what_is_left(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1000) as made:
        call = made.call(prompt=100, output=700)
        await made.budget.hold(call)
        assert call.request.output_limit is None  # what the caller asked for is right
        await made.end(call, 100, 700)
        call = made.call(prompt=100, output=700)
        await made.budget.hold(call)
        assert call.request.output_limit == 100
        assert call.hold.tokens == 200
        await made.end(call, 50, 100)
        call = made.call(prompt=100, output=700)
        with pytest.raises(QuotaExhausted):  # 50 left, the prompt alone may need 100
            await made.budget.hold(call)


async def test_when_only_holds_stand_in_the_way_calls_wait_in_their_order(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1000) as made:
        first = made.call(prompt=100, output=800)
        await made.budget.hold(first)
        order: list[int] = []

        async def late(number: int) -> None:
            call = made.call(prompt=100, output=300)
            await made.budget.hold(call)
            order.append(number)
            await made.end(call)

        tasks = []
        for number in range(3):
            tasks.append(asyncio.create_task(late(number)))
            await waiting(made, number + 1)
        small = made.call(prompt=10, output=10)  # would fit, but nobody overtakes
        overtaking = asyncio.create_task(made.budget.hold(small))
        await waiting(made, 4)
        await made.end(first, 50, 50)
        await asyncio.gather(*tasks, overtaking)
        assert order == [0, 1, 2]
        made.close(small)
        assert made.budget.waiting == 0


async def test_a_wait_ends_with_advice_to_come_back_soon(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1000, QUEUE_SECONDS=0.05) as made:
        await made.budget.hold(made.call(prompt=100, output=800))
        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call(prompt=100, output=300))
        assert refusal.value.code == "rate_limit_exceeded"
        assert refusal.value.retry_after <= 2
        assert "x-should-retry" not in refusal.value.headers()
        assert made.budget.waiting == 0


async def test_a_waiting_call_that_is_cancelled_leaves_the_line(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1000) as made:
        first = made.call(prompt=100, output=800)
        await made.budget.hold(first)
        gone = asyncio.create_task(made.budget.hold(made.call(prompt=100, output=600)))
        await waiting(made, 1)
        stays = made.call(prompt=100, output=300)
        task = asyncio.create_task(made.budget.hold(stays))
        await waiting(made, 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await made.end(first)
        assert await task
        assert made.budget.waiting == 0


async def test_a_new_day_begins_at_midnight_of_the_quotas_time_zone(tmp_path):
    zone = ZoneInfo("Europe/Berlin")
    clock = Clock(datetime(2026, 3, 29, 23, 59, 30, tzinfo=zone).timestamp())  # a day of 23 hours
    async with stages(tmp_path, clock=clock, DEFAULT_DAILY_TOKENS=1000, QUOTA_TIMEZONE="Europe/Berlin") as made:
        assert made.budget.days.today() == "2026-03-29"
        running = made.call(prompt=400, output=300)
        await made.budget.hold(running)
        done = made.call(prompt=100, output=200)
        await made.budget.hold(done)
        await made.end(done, 100, 200)
        with pytest.raises(QuotaExhausted) as refusal:
            await made.budget.hold(made.call(prompt=800, output=100))
        assert refusal.value.retry_after == pytest.approx(30.0)
        clock.now += 30
        assert made.budget.days.today() == "2026-03-30"
        fresh = made.call(prompt=800, output=100)
        assert await made.budget.hold(fresh)
        await made.end(running, 400, 300)  # began yesterday, counts yesterday
        await made.end(fresh, 800, 100)
        days = made.rows(
            "SELECT day, SUM(prompt_tokens + completion_tokens) FROM daily_totals GROUP BY day ORDER BY day"
        )
        assert days == [("2026-03-29", 1000), ("2026-03-30", 900)]


async def test_a_call_that_waits_over_midnight_is_admitted_by_the_new_day(tmp_path):
    clock = Clock(datetime(2026, 5, 1, 23, 59, 59, tzinfo=ZoneInfo("UTC")).timestamp())
    async with stages(tmp_path, clock=clock, DEFAULT_DAILY_TOKENS=1000) as made:
        await made.budget.hold(made.call(prompt=100, output=800))
        late = made.call(prompt=100, output=800)
        task = asyncio.create_task(made.budget.hold(late))
        await waiting(made, 1)
        clock.now += 2
        made.budget.tick()
        assert await task
        assert late.hold.day == "2026-05-02"


async def test_limits_that_change_hold_for_the_next_call(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        key_id = call.caller.key_id
        await made.budget.hold(call)
        await made.store.change(lambda db: accounts.change(db, key_id, {"concurrency": 1}, "test"))
        with pytest.raises(ConcurrencyExceeded):
            await made.budget.hold(made.call())
        await made.store.change(lambda db: accounts.change(db, key_id, {"concurrency": 0}, "test"))
        assert await made.budget.hold(made.call())


async def test_a_key_that_was_disabled_or_deleted_meanwhile_is_refused(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        key_id = call.caller.key_id
        await made.store.change(lambda db: accounts.set_disabled(db, key_id, True, "test"))
        with pytest.raises(KeyDisabled):
            await made.budget.hold(call)
        await made.store.change(lambda db: accounts.delete(db, key_id, "test"))
        with pytest.raises(InvalidApiKey):
            await made.budget.hold(call)


async def test_disabling_a_key_ends_its_running_and_waiting_calls(tmp_path):
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1000) as made:
        running = made.call(prompt=100, output=800)
        await made.budget.hold(running)
        forever = asyncio.Event()
        running.task = asyncio.create_task(forever.wait())
        late = asyncio.create_task(made.budget.hold(made.call(prompt=100, output=300)))
        await waiting(made, 1)
        key_id = running.caller.key_id
        await made.store.change(lambda db: accounts.set_disabled(db, key_id, True, "test"))
        await asyncio.gather(running.task, return_exceptions=True)
        assert isinstance(running.cause, KeyDisabled)
        with pytest.raises(KeyDisabled):
            await late


async def test_an_expiring_key_ends_its_running_calls(tmp_path):
    clock = Clock()
    async with stages(tmp_path, clock=clock) as made:
        call = made.call()
        key_id, end = call.caller.key_id, clock.now + 5
        await made.store.change(lambda db: accounts.change(db, key_id, {"expires_at": end}, "test"))
        await made.budget.hold(call)
        call.task = asyncio.create_task(asyncio.Event().wait())
        made.budget.tick()
        assert call.cause is None
        clock.now += 5
        made.budget.tick()
        await asyncio.gather(call.task, return_exceptions=True)
        assert isinstance(call.cause, GatewayError)
        assert call.cause.code == "key_expired"
