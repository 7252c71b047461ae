"""Fresh identifiers: right form, never twice, never all zero."""

from __future__ import annotations

import re

import pytest

from gateway import identifiers


def test_unique_and_hexadecimal_over_many_pools() -> None:
    found = [identifiers.fresh(digits) for _ in range(4000) for digits in (32, 16)]
    assert len(set(found)) == len(found)
    assert all(len(one) in (16, 32) and int(one, 16) for one in found)


def test_all_zero_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifiers, "_pool", "0" * 16 + "1" * 16)
    monkeypatch.setattr(identifiers, "_at", 0)
    assert identifiers.fresh(16) == "1" * 16


def test_ordered_ones_sort_by_their_time(monkeypatch):
    now = [1_700_000_000.001]
    monkeypatch.setattr(identifiers.time, "time", lambda: now[0])
    found = []
    for _ in range(50):
        found.append(identifiers.ordered())
        now[0] += 0.0011
    assert found == sorted(set(found))
    assert found[0].startswith("1700000000001")
    assert all(re.fullmatch(r"[0-9]{13}[0-9a-f]{19}", one) for one in found)
