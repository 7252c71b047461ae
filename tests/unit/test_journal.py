"""The journal of calls under way: what a dead process has left is read back whole, or not at all."""

import os
import signal
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.doubles.stages import Stages, settings_for, stages

from gateway import journal
from gateway.call import Outcome, Usage
from gateway.errors import LedgerUnavailable
from gateway.journal import Held, Journal, JournalFull, Left, Slot
from gateway.store import StoreLocked


def held(name: str = "r1", **fields) -> Held:
    values = {
        "request_id": name, "key_id": "key_1", "organisation": None, "model": "m", "endpoint": "e", "tokens": 9,
        "day": "2026-01-01", "stream": True, "started_at": 5.25, "trace_id": None,
    }  # fmt: skip
    return Held(**{**values, **fields})


@pytest.fixture
def opened(tmp_path):
    made = Journal(tmp_path / "calls")
    assert made.open() == []
    assert made.begin() is None
    yield made
    made.close()


def left(made: Journal) -> dict[str, Left]:
    """What another process would find now."""
    found, problem = journal.read(made.path.read_bytes())
    assert problem is None
    return {call.held.request_id: call for call in found}


def test_a_call_is_kept_from_its_admission_to_its_record(opened):
    slot = opened.take(held(organisation="Ærø-lab", trace_id="0af7"))
    assert left(opened)["r1"] == Left(held(organisation="Ærø-lab", trace_id="0af7"), 0, 0, 0)
    for completion in range(1, 6):
        slot.note(Usage(7, completion, 2))
        assert left(opened)["r1"] == Left(slot.held, 7, completion, 2)
    slot.free()
    assert left(opened) == {}


def test_a_place_that_is_used_again_has_nothing_of_the_call_before(opened):
    first = opened.take(held("first", model="a longer name than that of the next"))
    first.note(Usage(1000, 1000, 1000))
    first.note(Usage(2000, 2000, 1000))
    first.free()
    opened.take(held("next"))
    assert left(opened) == {"next": Left(held("next"), 0, 0, 0)}


def test_more_calls_than_places_make_the_file_grow_and_the_bound_holds(opened, monkeypatch):
    monkeypatch.setattr(journal, "MOST_SLOTS", 1024)
    slots = []
    for number in range(1024):
        slots.append(opened.take(held(f"r{number}")))
        slots[-1].note(Usage(number, 1, 0))
    with pytest.raises(JournalFull, match="1024 calls"):
        opened.take(held("one too many"))
    found = left(opened)
    assert {name: call.prompt for name, call in found.items()} == {f"r{n}": n for n in range(1024)}
    slots[500].free()
    opened.take(held("again"))
    assert opened.path.stat().st_blocks * 512 >= 1024 * journal.SLOT_BYTES  # no hole that a full disk could hit


def test_a_disk_that_is_full_refuses_the_call_and_keeps_the_others(opened, monkeypatch):
    slots = [opened.take(held(f"r{number}")) for number in range(256)]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(JournalFull, match="No space"):
        opened.take(held("one more"))
    assert len(left(opened)) == 256
    slots[0].free()
    opened.take(held("fits"))


def test_names_that_are_too_long_are_cut_where_nothing_is_charged_by_them(opened):
    opened.take(held(model="m" * 5000, organisation="o" * 200))
    assert left(opened)["r1"].held.model == "m" * 200
    with pytest.raises(JournalFull, match="too long"):
        opened.take(held("r2", organisation="o" * 5000))
    assert set(left(opened)) == {"r1"}


def test_a_number_that_no_engine_can_mean_is_not_kept(opened):
    slot = opened.take(held())
    slot.note(Usage(5, 6, 0))
    slot.note(Usage(10**30, 1, 0))
    slot.note(Usage(-3, 1, 0))
    assert left(opened)["r1"] == Left(slot.held, 5, 6, 0)


def test_a_second_process_is_turned_away(opened):
    with pytest.raises(BlockingIOError):
        Journal(opened.path).open()


@given(st.binary(max_size=3), st.integers(0, journal.SLOT_BYTES - 3), st.integers(1, 6))
def test_no_damage_to_a_slot_makes_a_usage_that_was_not_noted(tmp_path_factory, damage, place, notes):
    made = Journal(tmp_path_factory.mktemp("j") / "calls")
    made.open()
    made.begin()
    slot = made.take(held())
    said = [(0, 0, 0)]
    for number in range(1, notes + 1):
        slot.note(Usage(100 * number, 7 * number, number))
        said.append((100 * number, 7 * number, number))
    made.close()
    data = bytearray(made.path.read_bytes())
    at = 4096 + place
    data[at : at + len(damage)] = damage
    found, problem = journal.read(bytes(data))
    if not found:
        assert problem is not None or not any(data[4096:4104])
    else:
        assert found[0].held == slot.held
        assert (found[0].prompt, found[0].completion, found[0].cached) in said


def test_every_instant_of_writing_a_usage_reads_as_the_one_before_or_after(opened):
    """A process may die after any byte of a write."""
    slot = opened.take(held())
    slot.note(Usage(10, 1, 0))
    states = []
    for number in range(2, 5):
        before = opened.path.read_bytes()
        slot.note(Usage(10, number, 3))
        states.append((number, before, opened.path.read_bytes()))
    for number, before, after in states:
        changed = [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        for cut in range(changed[0], changed[-1] + 2):
            found, problem = journal.read(after[:cut] + before[cut:])
            assert problem is None
            assert found[0].completion in (number - 1, number)


def test_every_instant_of_taking_a_place_reads_as_no_call_or_the_whole(opened):
    first = opened.take(held("before", model="another"))
    first.note(Usage(9, 9, 9))
    first.free()
    before = opened.path.read_bytes()
    opened.take(held())
    after = opened.path.read_bytes()
    at = next(n for n in range(4096, len(before)) if before[n] != after[n])
    assert at < 4096 + 8  # the number that makes it live, which is written last
    for cut in range(4096 + 8, 4096 + 400):
        half = after[:4096] + before[4096 : 4096 + 8] + after[4096 + 8 : cut] + before[cut:]
        assert journal.read(half) == ([], None)
    for cut in range(4096, 4096 + 8):
        found, _ = journal.read(after[:4096] + after[4096:cut] + before[cut : 4096 + 8] + after[4096 + 8 :])
        assert found in ([], [Left(held(), 0, 0, 0)])


def test_what_a_killed_process_has_noted_is_there(tmp_path):
    """A real process, a real SIGKILL, in the middle of writing as fast as it can."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        made = Journal(tmp_path / "calls")
        made.open()
        made.begin()
        slots = [made.take(held(f"r{n}")) for n in range(10)]
        for number in range(1, 10_000_000):
            for slot in slots:
                slot.note(Usage(number, number, number))
            if number % 1000 == 0:
                os.write(writes, struct.pack("<Q", number))
        os._exit(0)
    os.close(writes)
    told = 0
    for _ in range(5):
        (told,) = struct.unpack("<Q", os.read(reads, 8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(reads, 8):
        (told,) = struct.unpack("<Q", data)
    os.close(reads)
    found, problem = journal.read((tmp_path / "calls").read_bytes())
    assert problem is None
    assert len(found) == 10
    assert all(call.prompt == call.completion == call.cached and told <= call.prompt <= told + 1001 for call in found)
    assert max(call.prompt for call in found) - min(call.prompt for call in found) <= 1


# Through the store


def journal_of(folder):
    return folder / "gateway.sqlite3.calls"


async def dead(folder, count: int = 3) -> list[Slot]:
    """A gateway that ended with calls under way."""
    made = Stages(settings_for(folder))
    await made.start()
    slots = []
    for number in range(count):
        call = made.call(request_id=f"left-behind-{number}")
        await made.budget.hold(call)
        call.note(Usage(10, number + 1, 0, known=True))
        slots.append(call.hold.slot)
    await made.stop()
    return slots


async def test_calls_of_a_dead_process_are_settled_once_at_what_was_read(tmp_path):
    await dead(tmp_path)
    again = journal_of(tmp_path).read_bytes()
    for lost in (3, 0, 0):
        async with stages(tmp_path) as made:
            assert made.started.lost == lost
            rows = made.rows("SELECT prompt_tokens, completion_tokens, outcome, stream FROM usage_records ORDER BY id")
            assert rows == [(10, 1, "lost", 0), (10, 2, "lost", 0), (10, 3, "lost", 0)]
            day = made.budget.account(made.call().caller.key_id).day(made.budget.days.today())
            assert (day.used, day.held, day.requests) == (36, 0, 3)
            assert (await made.store.read(lambda db: db.rows("SELECT COUNT(*) FROM holds")))[0] == (0,)
        journal_of(tmp_path).write_bytes(again)  # as if it had died before it could forget them


async def test_a_record_that_was_committed_is_not_lost_as_well(tmp_path):
    made = Stages(settings_for(tmp_path))
    await made.start()
    call = made.call()
    await made.budget.hold(call)
    call.note(Usage(1, 1, 0))
    before = journal_of(tmp_path).read_bytes()
    await made.end(call)
    await made.stop()
    journal_of(tmp_path).write_bytes(before)  # killed between the commit and the freeing of the place
    async with stages(tmp_path) as made:
        assert made.started.lost == 0
        assert made.rows("SELECT outcome, completion_tokens FROM usage_records") == [("ok", 20)]


def garbage(data: bytes) -> bytes:
    return b"\xa5" * 300_000


def foreign(data: bytes) -> bytes:
    return b"SQLite format 3\0" + data[16:]


def newer(data: bytes) -> bytes:
    return data[:8] + struct.pack("<I", journal.VERSION + 1) + data[12:]


def cut(data: bytes) -> bytes:
    return data[:5000]


@pytest.mark.parametrize("how", [garbage, foreign, newer, cut])
async def test_a_journal_that_cannot_be_read_is_set_aside_and_the_start_goes_on(tmp_path, how):
    await dead(tmp_path)
    damaged = how(journal_of(tmp_path).read_bytes())
    journal_of(tmp_path).write_bytes(damaged)
    async with stages(tmp_path) as made:
        assert made.started.damaged_journal is not None
        assert (tmp_path / made.started.damaged_journal).read_bytes() == damaged
        call = made.call()
        await made.budget.hold(call)
        await made.end(call)
    async with stages(tmp_path) as made:
        assert made.started.damaged_journal is None


async def test_one_damaged_call_hides_only_itself(tmp_path):
    await dead(tmp_path)
    data = bytearray(journal_of(tmp_path).read_bytes())
    data[4096 + 100 : 4096 + 104] = b"\xff" * 4
    journal_of(tmp_path).write_bytes(data)
    async with stages(tmp_path) as made:
        assert made.started.lost == 2
        assert made.started.damaged_journal is not None


async def test_an_enormous_journal_is_not_read(tmp_path):
    with journal_of(tmp_path).open("wb") as file:
        file.truncate(50 * 2**30)
    async with stages(tmp_path) as made:
        assert made.started.damaged_journal is not None
        assert made.ledger.healthy


async def test_without_a_journal_the_rows_of_the_database_are_settled(tmp_path):
    made = Stages(settings_for(tmp_path))
    await made.start()
    call = made.call()
    await made.budget.hold(call)
    call.usage = Usage(8, 9, 0)
    call.started -= 1
    made.ledger.flush()
    await made.store.change(lambda db: None)
    await made.stop()
    journal_of(tmp_path).unlink()
    async with stages(tmp_path) as again:
        assert again.started.lost == 1
        assert again.rows("SELECT outcome, prompt_tokens, completion_tokens FROM usage_records") == [("lost", 8, 9)]


async def test_a_call_in_both_is_settled_once_at_the_larger_usage(tmp_path):
    made = Stages(settings_for(tmp_path))
    await made.start()
    call = made.call()
    await made.budget.hold(call)
    call.usage = Usage(8, 9, 0)
    call.started -= 1
    made.ledger.flush()
    await made.store.change(lambda db: None)
    call.note(Usage(8, 12, 0))
    await made.stop()
    async with stages(tmp_path) as again:
        assert again.rows("SELECT prompt_tokens, completion_tokens FROM usage_records") == [(8, 12)]
        assert again.rows("SELECT COUNT(*) FROM holds") == [(0,)]


async def test_a_short_call_is_never_a_row_of_holds(tmp_path):
    async with stages(tmp_path) as made:
        call = made.call()
        await made.budget.hold(call)
        made.ledger.flush()
        await made.store.change(lambda db: None)
        assert made.rows("SELECT COUNT(*) FROM holds") == [(0,)]
        await made.end(call)
        assert call.hold.slot.row is False
        assert made.rows("SELECT COUNT(*) FROM usage_records") == [(1,)]


async def test_where_no_place_is_left_nothing_is_admitted_and_nothing_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MOST_SLOTS", 256)
    async with stages(tmp_path, DEFAULT_DAILY_TOKENS=1_000_000) as made:
        calls = [made.call() for _ in range(256)]
        for call in calls:
            assert await made.budget.hold(call)
        late = made.call()
        with pytest.raises(LedgerUnavailable):
            await made.budget.hold(late)
        late.outcome = Outcome.REFUSED
        made.close(late)
        for call in calls:
            await made.end(call)
        await made.store.change(lambda db: None)
        assert await made.budget.hold(made.call())
        day = made.budget.account(late.caller.key_id).day(made.budget.days.today())
        assert (day.used, day.held) == (256 * 30, 150)


async def test_a_second_gateway_on_one_journal_is_turned_away(tmp_path):
    async with stages(tmp_path):
        other = Stages(settings_for(tmp_path))
        (tmp_path / "gateway.sqlite3.lock").unlink()  # somebody meant well
        with pytest.raises(StoreLocked, match="another gateway"):
            await other.start()
