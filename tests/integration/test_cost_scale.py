"""What a call costs does not depend on how many keys there are, or how much the ledger holds: function calls, counted."""

from __future__ import annotations

import hashlib
import math
import sqlite3
from pathlib import Path

import pytest
from tests.doubles.records import record
from tests.doubles.vllm import VllmDouble
from tests.integration.test_hot_path_cost import Counted

from gateway.keys import digest_of
from gateway.store import Database, batch, migrate
from gateway.store.schema import USAGE_COLUMNS

TOLERANCE = 1.03


def fill(path: Path, size: int) -> None:
    """A database with `size` keys and `size` usage records."""
    database = Database(f"sqlite:///{path}")
    with database.session():
        migrate(database)
    file = sqlite3.connect(path)
    numbers = range(size)
    secret = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    file.executemany(
        "INSERT INTO keys (id, name, organisation, priority, weight, disabled, origin, created_at, generation) "
        "VALUES (?, ?, NULL, 'normal', 1, 0, 'made', 0, 1)",
        ((f"key_{number}", f"name {number}") for number in numbers),
    )
    file.executemany("INSERT INTO limits (key_id, daily_tokens) VALUES (?, 1000000)", ((f"key_{n}",) for n in numbers))
    file.executemany(
        "INSERT INTO key_secrets (digest, key_id, not_before) VALUES (?, ?, 0)",
        ((digest_of(f"sk-gw-{secret[number][:32]}"), f"key_{number}") for number in numbers),
    )
    columns = ", ".join(USAGE_COLUMNS)
    marks = ", ".join("?" * len(USAGE_COLUMNS))
    file.executemany(
        f"INSERT INTO usage_records ({columns}) VALUES ({marks})",
        (batch.usage_row(record(secret[number][:32], key_id=f"key_{number}")) for number in numbers),
    )
    file.execute("UPDATE meta SET value = 1")
    file.commit()
    file.close()


def counted(engine: VllmDouble, folder: Path, size: int, enough: float) -> float:
    """The main thread's function calls for one call of a gateway with `size` keys and records."""
    folder.mkdir()
    fill(folder / "gateway.sqlite3", size)
    gateway = Counted(engine, folder)
    try:
        return gateway.cheapest(enough)[0]
    finally:
        gateway.process.kill()
        gateway.process.wait()


def compare(folder: Path, sizes: tuple[int, ...]) -> None:
    with VllmDouble() as engine:
        found = {sizes[0]: counted(engine, folder / str(sizes[0]), sizes[0], enough=math.inf)}
        for size in sizes[1:]:
            found[size] = counted(engine, folder / str(size), size, enough=found[sizes[0]] * TOLERANCE)
    print(" ".join(f"{size:,} keys and records: {each:.0f} function calls;" for size, each in found.items()))
    assert found[sizes[-1]] <= found[sizes[0]] * TOLERANCE, found


def test_a_call_costs_the_same_with_ten_and_ten_thousand_keys(tmp_path: Path) -> None:
    compare(tmp_path, (10, 10_000))


@pytest.mark.long
def test_a_call_costs_the_same_with_a_hundred_thousand_keys(tmp_path: Path) -> None:
    compare(tmp_path, (10, 1_000, 100_000))
