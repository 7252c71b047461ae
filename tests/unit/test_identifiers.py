"""Fresh identifiers: right form, never twice, never all zero."""

from __future__ import annotations

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
