"""One fault under load: what it cost the callers, whether the ledger is true, which alert spoke."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.stack.alarms import Alarms
from tests.stack.appliance import REPOSITORY, Appliance
from tests.stack.leaks import leaks
from tests.stack.load import Call, Load
from tests.stack.waiting import until

TABLE = REPOSITORY / ".state" / "reliability" / "faults.json"
ON_ITS_WAY = 1.0  # seconds between the booking of an answer and its last bytes at the caller, at the very most
GOOD_AFTERWARDS = 5  # whole answers in a row of time that count as "service is back"


@dataclass
class Proof:
    """A row of the table in docs/reliability.md."""

    fault: str
    seconds_to_recover: float
    in_flight: int
    lost: int
    refused: int
    ledger_difference: int
    alert: str


def inflict(
    appliance: Appliance,
    alarms: Alarms,
    fault: str,
    harm: Callable[[], object],
    heal: Callable[[], object] | None = None,
    *,
    within: float = 30,
    alert: str = "",
    no_alert: str = "",
    harm_is_felt: Callable[[Load], object] | None = None,
    longest: float | None = None,
) -> Proof:
    """Runs load, does `harm`, waits until it is felt, does `heal`, and states what happened.

    `under way` are the calls at the moment of the harm; lost are those of them whose caller got neither a whole answer
    nor an honest refusal. `alert` (`Name` or `Name/component`) is the alert of the product's rules that must fire because
    of the fault; `no_alert` says why none can.

    Fails when service is not back `within` seconds after the healing (after the harm, where nothing is healed by
    hand), when a call takes more than `longest` seconds, when the ledger and the callers disagree, when something secret
    is in a log, a series or the database, or when `alert` was already firing or stays silent.
    """
    assert bool(alert) != bool(no_alert), "say which alert speaks, or why none can"
    if alert:
        until(f"{alert} is silent before the fault", lambda: not alarms.fired(alert, time.time() - 3), 120)
    with Load(appliance.edge) as load:
        until("load is answered", lambda: len(load.whole_since(0)) >= 3, 120)
        began, called = time.time(), time.monotonic()
        said = harm()
        # A harm that takes time to prepare says when it struck.
        struck = said if isinstance(said, float) else called
        began += struck - called
        under_way = load.under_way(struck)
        if harm_is_felt:
            harm_is_felt(load)
        if alert and heal:
            until(f"alert {alert} fires", lambda: alarms.fired(alert, began), 120)
        mended = time.monotonic() if heal else struck
        if heal:
            heal()
        ended = until("service is back", lambda: steady(load, struck), max(within + 60, 120))
        seconds = away(ended, mended)
        if alert:
            until(f"alert {alert} fires", lambda: alarms.fired(alert, began), 120)
    assert seconds <= within, f"{fault}: back after {seconds:.1f} s, promised {within:.0f} s"
    slow = [call for call in load.finished_since(struck) if longest and call.ended - call.began > longest]
    assert not slow, f"{fault}: {len(slow)} calls took up to {max(c.ended - c.began for c in slow):.1f} s"
    difference = ledger_difference(appliance, load.calls, began)
    assert difference == 0, f"{fault}: the ledger and the callers differ by {difference} tokens"
    assert leaks(appliance, load.calls) == []
    proof = Proof(
        fault,
        round(seconds, 1),
        len(under_way),
        sum(call.lost for call in under_way),
        sum(1 for call in load.calls if call.answer.status in (429, 502, 503, 504)),
        difference,
        alert.replace("/", " of ") or f"none: {no_alert}",
    )
    keep(proof)
    return proof


def steady(load: Load, struck: float) -> list[Call]:
    """The calls that ended since, once the last of them were all answered whole; none before."""
    ended = load.finished_since(struck)
    last = ended[-GOOD_AFTERWARDS:]
    return ended if len(last) == GOOD_AFTERWARDS and all(call.whole for call in last) else []


def away(ended: list[Call], since: float) -> float:
    """Seconds from `since` to the first whole answer after the last failure; 0 when no call failed.

    `ended` are calls in the order of their ends, the last of them whole.
    """
    failed = [number for number, call in enumerate(ended) if not call.whole]
    if not failed:
        return 0.0
    return max(0.0, ended[failed[-1] + 1].ended - since)


def ledger_difference(appliance: Appliance, calls: list[Call], struck: float = 0) -> int:
    """Tokens that the ledger has more or less than callers saw, over all whole answers; 0 is the only good value.

    Also fails when a whole answer is missing or there twice, and when a call that broke is booked as a whole one.
    `struck` (Unix seconds) is the moment of a fault: an answer is booked before its last bytes are sent, so that the one
    that the fault met in between was made whole, and its caller could not see it.
    """
    whole = {call.answer.request_id: call for call in calls if call.whole}
    until(
        "every whole answer is in the ledger",
        lambda: whole.keys() <= {str(record["request_id"]) for record in appliance.ledger()},
        60,
    )
    records = appliance.ledger()
    twice = [name for name, count in Counter(record["request_id"] for record in records).items() if count > 1]
    assert not twice, f"in the ledger twice: {twice}"
    by_id = {str(record["request_id"]): record for record in records}
    difference = 0
    for request_id, call in whole.items():
        record, usage = by_id[request_id], call.answer.usage
        assert record["outcome"] == "ok", f"{request_id} was answered whole and is booked as {record['outcome']}"
        assert usage is not None
        difference += abs(int(str(record["prompt_tokens"])) - usage["prompt_tokens"])
        difference += abs(int(str(record["completion_tokens"])) - usage["completion_tokens"])
    for call in calls:
        record = by_id.get(call.answer.request_id, {})
        # The caller saw it break: it must not be booked as whole. The exception is an answer whose last bytes wait for
        # a ledger that cannot be written: it was made whole, and is booked as made once the ledger is back.
        if call.answer.status == 200 and call.answer.error not in ("", "ledger_unavailable"):
            met = abs(float(str(record.get("started_at", 0))) + float(str(record.get("duration_seconds", 0))) - struck)
            assert record.get("outcome") != "ok" or met < ON_ITS_WAY, f"{call.answer.request_id} broke, booked as ok"
    return difference


def keep(proof: Proof, table: Path = TABLE) -> None:
    """Adds the row to the results, from which `scripts/reliability-table` writes docs/reliability.md."""
    rows = json.loads(table.read_text()) if table.exists() else {}
    rows[proof.fault] = vars(proof)
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(rows, indent=1))
