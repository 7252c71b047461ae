"""What it cost: one record a call, whatever happens to the database."""

import asyncio
import sqlite3
import threading
import time
from types import SimpleNamespace

import pytest
from tests.doubles.stages import Clock, Stages, settings_for, stages
from tests.doubles.waiting import until

from gateway import store
from gateway.call import Outcome, Usage
from gateway.errors import InvalidRequest, LedgerUnavailable, QueueFull
from gateway.spool import Spool
from gateway.stages.ledger import Ledger
from gateway.store import batch


class Lock:
    """Another program that keeps the SQLite file locked for writing."""

    def __init__(self, path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=60)

    def __enter__(self):
        self.connection.execute("BEGIN EXCLUSIVE")
        return self

    def __exit__(self, *_):
        self.connection.execute("ROLLBACK")
        self.connection.close()


async def test_a_record_has_everything(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call(prompt=100, output=50)
        call.trace = SimpleNamespace(trace_id="0af7651916cd43dd8448eb211c80319c")
        call.backend = SimpleNamespace(name="vllm")
        call.request.stream = True
        await made.budget.hold(call)
        call.queue_seconds = 0.25
        call.first_token_at = call.started + 0.5
        call.usage = Usage(11, 22, 3, known=True)
        call.outcome = Outcome.OK
        await made.ledger.settle(call)
        columns = (
            "request_id, organisation, model, endpoint, prompt_tokens, completion_tokens, cached_tokens, outcome, code, "
            "status, stream, queue_seconds, first_token_seconds, trace_id, backend, day"
        )
        assert made.rows(f"SELECT {columns} FROM usage_records") == [
            (call.request_id, None, "m", "chat_completions", 11, 22, 3, "ok", None, 200, 1, 0.25, pytest.approx(0.5),
             "0af7651916cd43dd8448eb211c80319c", "vllm", call.hold.day)
        ]  # fmt: skip
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        assert made.ledger.computed_tokens == 33
        made.close(call)


async def test_once_however_often_it_is_ended(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        await made.budget.hold(call)
        await made.end(call)
        await made.ledger.settle(call)
        made.close(call)
        made.close(call)
        made.ledger._record(call)  # a second record of the same call, as a replay makes it
        call.settled = False
        await made.ledger.settle(call)
        assert made.rows("SELECT COUNT(*) FROM usage_records") == [(1,)]
        assert made.rows("SELECT prompt_tokens, requests FROM daily_totals") == [(10, 1)]


async def test_a_refusal_is_recorded_and_never_lost_to_a_chosen_id(tmp_path):
    async with stages(tmp_path) as made:
        for _ in range(3):
            call = made.call(request_id="same-for-all")
            call.error = QueueFull("full")
            call.outcome = Outcome.REFUSED
            made.close(call)
        await until("three records", lambda: made.rows("SELECT COUNT(*) FROM usage_records") == [(3,)])
        rows = made.rows("SELECT request_id, outcome, code, status FROM usage_records ORDER BY id")
        assert {row[1:] for row in rows} == {("refused", "queue_full", 429)}
        assert all(row[0].startswith("same-for-all") for row in rows)
        assert made.rows("SELECT requests, refusals FROM daily_totals") == [(0, 3)]


async def test_a_caller_without_a_key_leaves_no_record(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        call.caller = None
        call.error = InvalidRequest("no")
        made.close(call)
        await made.store.change(lambda db: None)
        assert made.rows("SELECT COUNT(*) FROM usage_records") == [(0,)]


async def test_a_model_that_nobody_serves_is_not_written_down(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call(model="sk-secret-in-the-model-field")
        await made.budget.hold(call)
        await until("a row", lambda: made.rows("SELECT model FROM holds") == [("other",)])
        await made.end(call)
        assert made.rows("SELECT model FROM usage_records") == [("other",)]


async def test_running_usage_is_noted_and_the_lease_renewed(tmp_path):
    clock = Clock()
    async with stages(tmp_path, clock=clock, HOLD_SECONDS=100) as made:
        call = made.call()
        await made.budget.hold(call)
        await until("a row", lambda: made.rows("SELECT prompt_tokens FROM holds") == [(0,)])
        lease = call.hold.expires_at
        call.usage = Usage(7, 3, 1, known=True)
        await until("usage noted", lambda: made.rows("SELECT prompt_tokens, completion_tokens FROM holds") == [(7, 3)])
        clock.now += 40  # no token for a while: the lease is renewed all the same
        await until(
            "lease renewed", lambda: made.rows("SELECT expires_at FROM holds")[0][0] == pytest.approx(lease + 40)
        )
        await made.end(call)


async def test_a_dead_process_leaves_lost_calls_with_their_last_known_usage(tmp_path):
    made = Stages(settings_for(tmp_path))
    await made.start()
    known, unknown = made.call(), made.call()
    await made.budget.hold(known)
    await made.budget.hold(unknown)
    known.usage = Usage(7, 3, 0, known=True)
    made.ledger.flush()
    await until("usage noted", lambda: (7, 3) in made.rows("SELECT prompt_tokens, completion_tokens FROM holds"))
    await made.stop()  # as far as the database can tell the process died: both holds are still there
    async with stages(tmp_path) as again:
        assert again.started.lost == 2
        rows = again.rows("SELECT request_id, prompt_tokens, completion_tokens, outcome FROM usage_records")
        assert set(rows) == {(known.request_id, 7, 3, "lost"), (unknown.request_id, 0, 0, "lost")}
        assert again.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        day = again.budget.account(known.caller.key_id).day(again.budget.days.today())
        assert (day.used, day.held, day.requests) == (10, 0, 2)


async def test_while_the_database_refuses_ended_calls_are_spooled_and_nothing_is_admitted(tmp_path):
    async with stages(tmp_path) as made:
        made.store._database._database.timeout = 0.1
        made.store._database.close()
        running = [made.call() for _ in range(3)]
        for call in running:
            await made.budget.hold(call)
        with Lock(tmp_path / "gateway.sqlite3"):
            await made.end(running[0])  # durable: the client may see its end
            assert not made.ledger.healthy
            assert made.store.problem
            assert made.store.aside == 1
            with pytest.raises(LedgerUnavailable) as refusal:
                await made.budget.hold(made.call())
            assert refusal.value.status == 503
            await made.end(running[1])
            assert len((tmp_path / "usage.spool").read_bytes().splitlines()) == 2
        await until("healed", lambda: made.ledger.healthy)
        assert made.store.aside == 0
        assert not (tmp_path / "usage.spool").exists()
        await made.end(running[2])
        assert made.rows("SELECT COUNT(*), SUM(prompt_tokens + completion_tokens) FROM usage_records") == [(3, 90)]
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        after = made.call()
        assert await made.budget.hold(after)


async def test_when_the_spool_refuses_too_the_client_is_not_told_the_end_and_nothing_is_lost(tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    async with stages(tmp_path, SPOOL_DIR=spool) as made:
        call = made.call()
        await made.budget.hold(call)
        with Lock(tmp_path / "gateway.sqlite3"):
            (spool / "usage.spool").mkdir()  # whoever opens it fails
            with pytest.raises(LedgerUnavailable):
                await made.end(call)
            made.close(call)
            assert made.store.aside == 1
            (spool / "usage.spool").rmdir()
        await until("healed", lambda: made.ledger.healthy)
        assert made.rows("SELECT COUNT(*), SUM(prompt_tokens) FROM usage_records") == [(1, 10)]


async def test_a_spool_left_behind_is_replayed_at_the_next_start_before_holds_are_settled(tmp_path):
    made = Stages(settings_for(tmp_path))
    await made.start()
    call = made.call()
    await made.budget.hold(call)
    call.usage, call.outcome = Usage(10, 20, 0, known=True), Outcome.OK
    record = made.ledger._record(call)
    await made.stop()
    Spool(tmp_path).append([record])
    async with stages(tmp_path) as again:
        assert (again.started.replayed, again.started.lost) == (1, 0)
        assert again.rows("SELECT outcome, prompt_tokens FROM usage_records") == [("ok", 10)]
        assert not (tmp_path / "usage.spool").exists()


async def test_a_torn_line_of_the_spool_hides_only_itself(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        records = []
        for number in range(3):
            call.request_id = f"r{number}"
            records.append(made.ledger._record(call))
    spool = Spool(tmp_path)
    spool.append(records[:1])
    with spool.path.open("ab") as file:
        file.write(b'{"request_id": "torn')
    spool.append(records[1:])
    assert [record.request_id for part in spool.read() for record in part] == ["r0", "r1", "r2"]
    assert spool.torn == 1


async def test_an_ended_call_survives_a_cancelled_wait(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        await made.budget.hold(call)
        task = asyncio.create_task(made.end(call))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        call.outcome = Outcome.CANCELLED
        made.close(call)
        await made.store.change(lambda db: None)
        assert made.rows("SELECT outcome FROM usage_records") == [("ok",)]
        assert made.budget.live == {}


async def test_a_hold_whose_lease_is_over_is_settled_by_the_sweeper(tmp_path):
    clock = Clock(now=1_000_000.0)  # long ago: by the real clock every lease is over
    async with stages(tmp_path, clock=clock) as made:
        leaked, live = made.call(), made.call()
        await made.budget.hold(leaked)
        await made.budget.hold(live)
        await until("two rows", lambda: made.rows("SELECT COUNT(*) FROM holds") == [(2,)])
        made.budget.release(leaked)  # gone from memory, its row forgotten
        made.store._next_sweep = 0.0
        await until("swept", lambda: made.rows("SELECT outcome FROM usage_records") == [("lost",)])
        assert made.rows("SELECT request_id FROM holds") == [(live.request_id,)]
        await made.end(live)


async def test_a_clock_that_steps_sweeps_no_call_that_has_just_ended(tmp_path, monkeypatch):
    """Its record is on the way while the sweeper looks: what is booked is the record, not the last known usage."""
    async with stages(tmp_path) as made:
        call = made.call()
        await made.budget.hold(call)
        await until("its row", lambda: made.rows("SELECT COUNT(*) FROM holds") == [(1,)])
        loop, live, ended = asyncio.get_running_loop(), made.store._live, threading.Event()

        def end() -> None:
            call.usage, call.outcome = Usage(100, 500, 0, known=True), Outcome.CANCELLED
            made.close(call)
            ended.set()

        def ends_at_that_moment():
            loop.call_soon_threadsafe(end)
            ended.wait(60)
            return live()

        now = time.time
        later = SimpleNamespace(time=lambda: now() + 3600, monotonic=time.monotonic)
        monkeypatch.setattr(store, "time", later)
        monkeypatch.setattr(made.store, "_live", ends_at_that_moment)
        made.store._next_sweep = 0.0
        await until("it is recorded", lambda: made.rows("SELECT COUNT(*) FROM usage_records") == [(1,)])
        read = "SELECT outcome, prompt_tokens + completion_tokens FROM usage_records"
        assert made.rows(read) == [("cancelled", 600)]
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]


async def test_the_ledgers_tick_outlives_a_fault(tmp_path):
    async with stages(tmp_path) as made:
        ticks = 0

        def broken() -> None:
            nonlocal ticks
            ticks += 1
            raise ValueError("a bug")

        ledger = Ledger(made.store, made.models, {}, made.budget.days)
        ledger.start(broken)
        await until("two ticks", lambda: ticks >= 2)
        await ledger.stop()


async def test_a_fault_of_ours_in_the_writer_stops_admission_and_loses_nothing(tmp_path, monkeypatch):
    """Whatever is wrong with a group, the writer lives on, its records are spooled, and it heals."""
    async with stages(tmp_path) as made:
        call = made.call()
        await made.budget.hold(call)
        write, faults, mended = batch.write, [], threading.Event()

        def faulty(database, group):
            if group.records and not (mended.is_set() and len(faults) >= 3):
                faults.append(group)
                raise ValueError("a bug")
            return write(database, group)

        monkeypatch.setattr(batch, "write", faulty)
        await made.end(call)
        assert not made.ledger.healthy
        with pytest.raises(LedgerUnavailable):
            await made.budget.hold(made.call())
        mended.set()
        await until("healed", lambda: made.ledger.healthy)
        assert len(faults) >= 3
        assert made.rows("SELECT COUNT(*), SUM(prompt_tokens) FROM usage_records") == [(1, 10)]


async def test_an_engine_that_counts_nonsense_does_not_stop_the_ledger(tmp_path):
    async with stages(tmp_path) as made:
        for prompt, completion in ((10**30, 5), (-7, 5), (3, -1)):
            call = made.call()
            await made.budget.hold(call)
            await made.end(call, prompt, completion)
        assert made.ledger.healthy
        rows = made.rows("SELECT prompt_tokens, completion_tokens FROM usage_records ORDER BY id")
        assert rows == [(1 << 40, 5), (0, 5), (3, 0)]
        used = made.budget.account(call.caller.key_id).day(made.budget.days.today()).used
        assert used == (1 << 40) + 13
