"""Runs every examination. Exit 0 when nothing is wrong, else 1. `--json` prints one object a line."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from scripts.daytwo.doctor import machine, service
from scripts.daytwo.doctor.finding import Finding, wrong
from scripts.daytwo.doctor.situation import Situation, look

EXAMINATIONS: tuple[Callable[[Situation], Iterator[Finding]], ...] = (
    machine.memory, machine.disk, machine.clock, machine.gpus, machine.docker, machine.ports,
    service.settings, service.secrets, service.containers, service.answer, service.ledger, service.backups,
    machine.alerts,
)  # fmt: skip
MARKS = {"ok": "  ok  ", "note": " note ", "wrong": "WRONG "}


def findings(situation: Situation) -> Iterator[Finding]:
    """All findings; an examination that breaks is a finding itself and does not hide the others."""
    for examine in EXAMINATIONS:
        try:
            yield from examine(situation)
        except Exception as problem:
            yield wrong(examine.__name__, f"could not be examined: {problem}", "please report this")


def main() -> int:
    """Prints the findings and returns the exit status."""
    count = 0
    for found in findings(look()):
        count += found.verdict == "wrong"
        if "--json" in sys.argv:
            print(json.dumps(asdict(found)), flush=True)
            continue
        print(f"{MARKS[found.verdict]} {found.area}: {found.what}", flush=True)
        if found.mend:
            print(f"         mend: {found.mend}", flush=True)
    if "--json" not in sys.argv:
        print(f"doctor: {count} wrong" if count else "doctor: nothing is wrong")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
