"""The line for other calls' holds: one for all keys, and none of them locks the others out."""

import asyncio

import pytest
from tests.doubles.stages import SECRET, Stages, stages

from gateway.call import Call
from gateway.errors import RateLimitExceeded

OTHER = "sk-other-0123456789"
KEYS = f"team={SECRET},other={OTHER}"
ROOM = 8


async def full(made: Stages) -> tuple[Call, list[asyncio.Task[bool]]]:
    """One call of `team` holds its whole day, and as many as may wait do."""
    first = made.call(prompt=100, output=800)
    await made.budget.hold(first)
    tasks = [asyncio.create_task(made.budget.hold(made.call(prompt=100, output=300))) for _ in range(ROOM)]
    await asyncio.sleep(0.01)
    assert made.budget.waiting == ROOM
    return first, tasks


async def test_a_key_with_fewer_calls_in_line_takes_the_place_of_the_last_of_the_one_with_most(tmp_path):
    async with stages(tmp_path, GATEWAY_API_KEYS=KEYS, DEFAULT_DAILY_TOKENS=1000, QUEUE_CALLS=ROOM) as made:
        _, tasks = await full(made)
        other = made.call(secret=OTHER, prompt=100, output=800)
        await made.budget.hold(other)

        late = [asyncio.create_task(made.budget.hold(made.call(secret=OTHER, prompt=100, output=300))) for _ in "ab"]
        await asyncio.sleep(0.01)

        assert not any(task.done() for task in late)
        assert [task.done() for task in tasks] == [False] * (ROOM - 2) + [True] * 2
        assert all(isinstance(task.exception(), RateLimitExceeded) for task in tasks[-2:])
        assert made.budget.waiting == ROOM
        await made.end(other)
        assert await late[0]
        for task in (*tasks, *late):
            task.cancel()
        await asyncio.gather(*tasks, *late, return_exceptions=True)
        assert made.budget.waiting == 0


async def test_a_key_that_has_most_of_the_line_gets_no_more_of_it(tmp_path):
    async with stages(tmp_path, GATEWAY_API_KEYS=KEYS, DEFAULT_DAILY_TOKENS=1000, QUEUE_CALLS=ROOM) as made:
        first, tasks = await full(made)

        with pytest.raises(RateLimitExceeded) as refusal:
            await made.budget.hold(made.call(prompt=100, output=300))

        assert refusal.value.retry_after == 1.0
        assert made.budget.waiting == ROOM
        await made.end(first)
        assert await tasks[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_keys_push_each_other_out_no_further_than_to_equal_parts(tmp_path):
    async with stages(tmp_path, GATEWAY_API_KEYS=KEYS, DEFAULT_DAILY_TOKENS=1000, QUEUE_CALLS=ROOM) as made:
        _, tasks = await full(made)
        await made.budget.hold(made.call(secret=OTHER, prompt=100, output=800))

        late = [
            asyncio.create_task(made.budget.hold(made.call(secret=OTHER, prompt=100, output=300))) for _ in range(20)
        ]
        await asyncio.sleep(0.01)

        assert made.budget.waiting == ROOM
        assert 2 <= sum(not task.done() for task in late) <= ROOM / 2
        for task in (*tasks, *late):
            task.cancel()
        await asyncio.gather(*tasks, *late, return_exceptions=True)
