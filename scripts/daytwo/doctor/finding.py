"""What an examination returns."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One fact. `mend` is the command or edit that puts it right; empty for what needs none."""

    area: str
    verdict: Verdict
    what: str
    mend: str = ""


def ok(area: str, what: str) -> Finding:
    """All is well here."""
    return Finding(area, "ok", what)


def note(area: str, what: str, mend: str = "") -> Finding:
    """Works, but the operator should know."""
    return Finding(area, "note", what, mend)


def wrong(area: str, what: str, mend: str) -> Finding:
    """Does not work, or soon will not."""
    return Finding(area, "wrong", what, mend)
