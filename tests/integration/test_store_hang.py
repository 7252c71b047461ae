"""A database that hangs instead of failing: calls end in bounded time, admission stops, everything is recorded once."""

import asyncio
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.doubles.postgres import postgres, programs
from tests.doubles.stages import SECRET, stages
from tests.doubles.waiting import until

from gateway.call import Outcome
from gateway.errors import LedgerUnavailable
from gateway.keys import digest_of
from gateway.store import StoreUnavailable, Unsure, accounts, batch, writer

needs_postgres = pytest.mark.skipif(
    programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"
)


@pytest.fixture(scope="module")
def server():
    with postgres() as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 2.0)


class Clients:
    """Calls one after the other, each with a count of its own, until told to stop."""

    def __init__(self, made, count: int) -> None:
        self.made = made
        self.over = False
        self.ended: dict[str, int] = {}
        self.refused = 0
        self.told_late = 0
        self.longest = 0.0
        self.tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    async def _run(self, number: int) -> None:
        turn = 0
        while not self.over:
            turn += 1
            call = self.made.call()
            try:
                await self.made.budget.hold(call)
            except LedgerUnavailable as refusal:
                call.outcome, call.error = Outcome.REFUSED, refusal
                self.made.close(call)
                self.refused += 1
                await asyncio.sleep(0.01)
                continue
            began = time.monotonic()
            try:
                await self.made.end(call, number + 1, turn % 100)
            except LedgerUnavailable:  # it waited too long for a database that hangs; its record is kept all the same
                self.told_late += 1
                self.made.close(call)
            self.longest = max(self.longest, time.monotonic() - began)
            self.ended[call.request_id] = number + 1 + turn % 100

    async def stop(self) -> None:
        self.over = True
        async with asyncio.timeout(60):
            await asyncio.gather(*self.tasks)


async def prove(made, hang, go_on) -> None:
    """Hang the database in the middle of many commits; every call that ended is in the ledger once, with its tokens."""
    clients = Clients(made, 16)
    await until("many calls", lambda: len(clients.ended) > 200)
    for _ in range(2):
        began = time.monotonic()
        hang()
        await until("admission stops", lambda: clients.refused > 0)
        noticed = time.monotonic() - began
        await until("nobody waits", lambda: not made.budget.live)
        assert made.store.aside > 0
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(60):
                await made.store.change(lambda database: None)
        go_on()
        await until("it heals", lambda: made.ledger.healthy)
        assert made.store.aside == 0
        clients.refused, before = 0, len(clients.ended)
        await until("calls go on", lambda before=before: len(clients.ended) > before + 50)
    await clients.stop()
    await made.store.change(lambda database: None)
    read = "SELECT request_id, prompt_tokens + completion_tokens FROM usage_records WHERE outcome = 'ok'"
    rows = await made.store.read(lambda database: database.rows(read))
    assert {name: int(tokens) for name, tokens in rows} == clients.ended
    assert len(rows) == len(clients.ended)
    read = (
        "SELECT SUM(prompt_tokens + completion_tokens), SUM(requests), (SELECT COUNT(*) FROM holds) FROM daily_totals"
    )
    totals = (await made.store.read(lambda database: database.rows(read)))[0]
    assert [int(value) for value in totals] == [sum(clients.ended.values()), len(clients.ended), 0]
    print(
        f"noticed after {noticed:.2f} s, the longest call waited {clients.longest:.2f} s, {clients.told_late} told late"
    )
    assert clients.longest < writer.STALL_SECONDS + 20  # a call that waited for the database would never have ended


@needs_postgres
async def test_a_server_that_stands_still(tmp_path, server):
    async with stages(tmp_path, DATABASE_URL=server.database()) as made:
        try:
            await prove(made, server.pause, server.resume)
        finally:
            server.resume()


class BlackHole:
    """A wire to PostgreSQL's socket that can swallow everything that the server answers: its commits stay in doubt."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.port = 0
        self.open = asyncio.Event()
        self.open.set()
        self.server: asyncio.Server | None = None
        self.tasks: set[asyncio.Task] = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        assert self.server is not None
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def _serve(self, reader, writer) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        if not self.open.is_set():
            await self.open.wait()
        back_reader, back_writer = await asyncio.open_unix_connection(self.path)
        swallowed = False

        async def answers() -> None:
            nonlocal swallowed
            while data := await back_reader.read(65536):
                swallowed = swallowed or not self.open.is_set()
                if not swallowed:
                    writer.write(data)

        back = asyncio.create_task(answers())
        try:
            while data := await reader.read(65536):
                back_writer.write(data)
        except OSError:
            pass
        finally:
            back.cancel()
            back_writer.close()
            writer.close()


@needs_postgres
async def test_answers_that_never_arrive(tmp_path, server):
    parts = urlsplit(server.database())
    path = parse_qs(parts.query)["host"][0] + "/.s.PGSQL.5432"
    async with BlackHole(path) as hole:
        url = f"postgresql://gateway@127.0.0.1:{hole.port}{parts.path}"
        async with stages(tmp_path, DATABASE_URL=url) as made:
            await prove(made, hole.open.clear, hole.open.set)


async def test_a_disk_that_hangs_keeps_nobody_waiting_and_loses_nothing(tmp_path, monkeypatch):
    """No wait for a disk can be ended; those who wait for it can."""
    monkeypatch.setattr(writer, "STALL_SECONDS", 2.0)
    go_on = threading.Event()
    write, stuck = batch.write, threading.Event()

    def hanging(database, group):
        if group.records and not go_on.is_set():
            stuck.set()
            go_on.wait(120)
        return write(database, group)

    async with stages(tmp_path) as made:
        calls = [made.call() for _ in range(3)]
        for call in calls:
            await made.budget.hold(call)
        monkeypatch.setattr(batch, "write", hanging)
        ends = [asyncio.create_task(made.end(calls[0]))]
        await until("the disk hangs", stuck.is_set)
        ends.append(asyncio.create_task(made.end(calls[1])))
        told = await asyncio.gather(*ends, return_exceptions=True)
        assert [type(error) for error in told] == [LedgerUnavailable, LedgerUnavailable]
        assert not go_on.is_set()  # nobody waited for the disk
        for call in calls[:2]:
            made.close(call)
        with pytest.raises(LedgerUnavailable):
            await made.budget.hold(made.call())
        go_on.set()
        await until("it heals", lambda: made.ledger.healthy)
        await made.end(calls[2])
        assert made.rows("SELECT COUNT(*), SUM(prompt_tokens) FROM usage_records WHERE outcome = 'ok'") == [(3, 30)]


@pytest.mark.parametrize("left", [False, True])
async def test_a_change_that_was_refused_is_not_made_later(tmp_path, monkeypatch, left):
    """Neither when the database took too long for what came before it, nor when who asked for it hung up."""
    if not left:
        monkeypatch.setattr(writer, "STALL_SECONDS", 0.5)
    go_on = threading.Event()
    write, stuck = batch.write, threading.Event()

    def hanging(database, group):
        stuck.set()
        go_on.wait(120)
        return write(database, group)

    async with stages(tmp_path) as made:
        key_id = made.call().caller.key_id
        call = made.call()
        await made.budget.hold(call)
        monkeypatch.setattr(batch, "write", hanging)
        end = asyncio.create_task(made.end(call))
        await until("the disk hangs", stuck.is_set)
        rotation = asyncio.create_task(made.store.change(lambda db: accounts.rotate(db, key_id, 0, "admin")))
        await asyncio.sleep(0)
        if left:
            rotation.cancel()
        told = (await asyncio.gather(rotation, return_exceptions=True))[0]
        assert type(told) is (asyncio.CancelledError if left else StoreUnavailable)
        go_on.set()
        await asyncio.gather(end, return_exceptions=True)
        await until("it heals", lambda: made.ledger.healthy)
        await made.store.change(lambda _: None)
        assert made.keyring.find(digest_of(SECRET)).not_after is None
        assert made.rows("SELECT COUNT(*) FROM audit WHERE actor = 'admin'") == [(0,)]
        made.close(call)


async def test_a_change_that_hangs_halfway_is_told_as_unsure(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "STALL_SECONDS", 0.5)
    go_on = threading.Event()

    def slow(database):
        go_on.wait(120)
        return accounts.create(database, {"name": "late"}, "admin")

    async with stages(tmp_path) as made:
        works = (lambda _: None, slow, lambda _: None)  # made and not yet told, being made, not begun
        told = await asyncio.gather(*map(made.store.change, works), return_exceptions=True)
        assert [type(error) for error in told] == [Unsure, Unsure, StoreUnavailable]
        go_on.set()
        await until("it is made all the same", lambda: len(list(made.keyring.callers())) == 2)


@needs_postgres
async def test_a_server_that_stands_still_is_noticed_without_any_call(tmp_path, server):
    async with stages(tmp_path, DATABASE_URL=server.database()) as made:
        calls = [made.call() for _ in range(3)]
        for call in calls:
            await made.budget.hold(call)
        try:
            server.pause()
            await until("it is noticed", lambda: not made.ledger.healthy)
            with pytest.raises(LedgerUnavailable):
                await made.budget.hold(made.call())
            async with asyncio.timeout(writer.STALL_SECONDS + 20):
                for call in calls:
                    await made.end(call)  # safe in the spool
            assert made.store.aside == 3
        finally:
            server.resume()
        await until("it heals", lambda: made.ledger.healthy)
        rows = await made.store.read(lambda database: database.rows("SELECT COUNT(*) FROM usage_records"))
        assert rows == [(3,)]
