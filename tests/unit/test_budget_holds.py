"""Any order of admissions, ends, drops and changes: holds never go below zero, never leak, never overspend."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.doubles.stages import Clock, Stages, settings_for

from gateway.call import Call, Outcome, Usage
from gateway.errors import GatewayError
from gateway.store import accounts

QUOTA, SHARED = 3000, 4000

ADMIT = st.tuples(
    st.just("admit"), st.integers(0, 1), st.integers(1, 900), st.none() | st.integers(1, 900), st.integers(1, 3)
)
END = st.tuples(st.just("end"), st.integers(0, 20), st.floats(0, 1), st.sampled_from(["ok", "cancelled", "failed"]))
PASS = st.tuples(st.just("pass"), st.sampled_from([0.5, 20.0, 70.0]))


class World:
    """Two keys of one organisation, and what a bystander knows of them."""

    def __init__(self, made: Stages, clock: Clock, secrets: list[str]) -> None:
        self.made = made
        self.clock = clock
        self.secrets = secrets
        self.running: list[Call] = []
        self.waiting: list[tuple[Call, asyncio.Task]] = []
        self.settled = [0, 0]

    async def admit(self, key: int, prompt: int, output: int | None, n: int) -> None:
        call = self.made.call(secret=self.secrets[key], prompt=prompt, output=output, n=n)
        task = asyncio.create_task(self.made.budget.hold(call))
        await self.collect([*self.waiting, (call, task)])

    async def collect(self, tasks: list[tuple[Call, asyncio.Task]]) -> None:
        """Let calls go on until each was admitted or refused, or waits for others' holds."""
        async with asyncio.timeout(60):
            while True:
                undecided = [(call, task) for call, task in tasks if not task.done()]
                if len(undecided) == self.made.budget.waiting and all(call.hold is None for call, _ in undecided):
                    break
                await asyncio.sleep(0.0005)
        self.waiting = undecided
        for call, task in tasks:
            if not task.done():
                continue
            refusal = task.exception()
            if refusal is None:
                assert task.result() is True
                self.running.append(call)
                continue
            assert isinstance(refusal, GatewayError)
            assert refusal.retry_after > 0
            call.outcome, call.error = Outcome.REFUSED, refusal
            self.made.close(call)

    async def end(self, index: int, share: float, outcome: str) -> None:
        if not self.running:
            return
        call = self.running.pop(index % len(self.running))
        request = call.request
        limit = request.output_limit if request.output_limit is not None else request.max_output
        used = int((request.prompt_bound + request.n * (limit or 0)) * share)
        call.usage = Usage(min(used, request.prompt_bound), max(0, used - request.prompt_bound), 0, known=True)
        call.outcome = Outcome(outcome)
        self.settled[self.secrets.index(self.secret_of(call))] += call.usage.total
        await self.made.ledger.settle(call)
        self.made.close(call)
        await self.collect(self.waiting)

    def secret_of(self, call: Call) -> str:
        names = [self.made.call(secret=secret).caller.key_id for secret in self.secrets]
        return self.secrets[names.index(call.caller.key_id)]

    def check(self) -> None:
        budget = self.made.budget
        today = budget.days.today()
        total = held_of_all = 0
        for index, secret in enumerate(self.secrets):
            key_id = self.made.call(secret=secret).caller.key_id
            day = budget.account(key_id).day(today)
            held = sum(call.hold.tokens for call in self.running if call.caller.key_id == key_id)
            assert day.held == held >= 0
            assert day.used == self.settled[index]
            assert day.used + day.held <= QUOTA
            total += day.used
            held_of_all += held
        shared = budget.organisation("lab").day(today)
        assert (shared.used, shared.held) == (total, held_of_all)
        assert shared.used + shared.held <= SHARED
        assert set(budget.live) == {call.request_id for call in self.running}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ADMIT | ADMIT | END | PASS, max_size=30))
def test_holds_add_up_in_any_order(steps):
    async def run() -> None:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            made = Stages(
                settings_for(
                    Path(folder), DEFAULT_DAILY_TOKENS=QUOTA, DEFAULT_TOKENS_PER_MINUTE=2500,
                    DEFAULT_REQUESTS_PER_MINUTE=30, DEFAULT_CONCURRENCY=4, QUEUE_CALLS=3,
                ), clock,
            )  # fmt: skip
            await made.start()
            secrets = []
            for name in "ab":
                values = {"name": name, "organisation": "lab"}
                secrets.append((await made.store.change(lambda db, v=values: accounts.create(db, v, "test")))[1])
            await made.store.change(lambda db: accounts.set_organisation(db, "lab", SHARED, "test"))
            world = World(made, clock, secrets)
            try:
                for kind, *values in steps:
                    if kind == "pass":
                        clock.now += values[0]
                    else:
                        await getattr(world, kind)(*values)
                    world.check()
                for _, task in world.waiting:
                    task.cancel()
                await asyncio.gather(*(task for _, task in world.waiting), return_exceptions=True)
                world.waiting = []
                while world.running:
                    await world.end(0, 0.5, "ok")
                world.check()
                await made.store.change(lambda db: None)
                sums = "SELECT SUM(prompt_tokens + completion_tokens), COUNT(*) FROM "
                recorded = made.rows(sums + "usage_records")[0]
                assert (recorded[0] or 0) == sum(world.settled)
                assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
                totals = made.rows(
                    "SELECT SUM(prompt_tokens + completion_tokens), SUM(requests + refusals) FROM daily_totals"
                )
                assert totals[0] == recorded if recorded[1] else totals[0] == (None, None)
            finally:
                await made.stop()

    asyncio.run(run())
