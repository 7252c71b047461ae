"""One fault under load: what it cost the callers, whether the ledger is true, which alert spoke."""

import http.client
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.stack.appliance import REPOSITORY, Appliance
from tests.stack.load import Call, Load
from tests.stack.waiting import until

TABLE = REPOSITORY / ".state" / "reliability" / "faults.json"
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
    fault: str,
    harm: Callable[[], object],
    heal: Callable[[], object] | None = None,
    within: float = 30,
    alert: str = "",
    harm_is_felt: Callable[[Load], object] | None = None,
) -> Proof:
    """Runs load, does `harm`, waits until it is felt, does `heal`, and states what happened.

    `under way` are the calls at the moment of the harm; lost are those of them whose caller got neither a whole answer
    nor an honest refusal.

    Fails when service is not back `within` seconds after the healing (after the harm, where nothing is healed by
    hand), when the ledger and the callers disagree, when a secret is in a log, or when `alert` stays silent.
    """
    with Load(appliance.edge) as load:
        until("load is answered", lambda: len(load.whole_since(0)) >= 3, 120)
        called = time.monotonic()
        said = harm()
        # A harm that takes time to prepare says when it struck.
        struck = said if isinstance(said, float) else called
        under_way = load.under_way(struck)
        seen = ""
        if harm_is_felt:
            harm_is_felt(load)
        if alert and heal:
            seen = until(f"alert {alert}", lambda: alert_state(appliance, alert), 240)
        mended = time.monotonic() if heal else struck
        if heal:
            heal()
        until("service is back", lambda: steady(load, struck), within + 60)
        seconds = away(load, struck, mended)
        if alert and not seen:
            seen = until(f"alert {alert}", lambda: alert_state(appliance, alert), 120)
    assert seconds <= within, f"{fault}: back after {seconds:.1f} s, promised {within:.0f} s"
    difference = ledger_difference(appliance, load.calls)
    assert difference == 0, f"{fault}: the ledger and the callers differ by {difference} tokens"
    assert appliance.key not in appliance.logs(), f"{fault}: the caller's key is in a log"
    proof = Proof(
        fault,
        round(seconds, 1),
        len(under_way),
        sum(call.lost for call in under_way),
        sum(1 for call in load.calls if call.answer.status in (429, 502, 503, 504)),
        difference,
        f"{alert} ({seen})" if alert else "",
    )
    keep(proof)
    return proof


def steady(load: Load, struck: float) -> bool:
    """The last calls that ended were all answered whole."""
    last = load.finished_since(struck)[-GOOD_AFTERWARDS:]
    return len(last) == GOOD_AFTERWARDS and all(call.whole for call in last)


def away(load: Load, struck: float, since: float) -> float:
    """Seconds from `since` to the first whole answer after the last failure; 0 when no call failed."""
    ended = load.finished_since(struck)
    failed = [number for number, call in enumerate(ended) if not call.whole]
    if not failed:
        return 0.0
    return max(0.0, ended[failed[-1] + 1].ended - since)


def ledger_difference(appliance: Appliance, calls: list[Call]) -> int:
    """Tokens that the ledger has more or less than callers saw, over all whole answers; 0 is the only good value.

    Also fails when a whole answer is missing or there twice, and when a call that broke is booked as a whole one.
    """
    whole = {call.answer.request_id: call for call in calls if call.whole}
    until(
        "every whole answer is in the ledger",
        lambda: whole.keys() <= {str(record["request_id"]) for record in appliance.ledger()},
        30,
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
            assert record.get("outcome") != "ok", f"{call.answer.request_id} broke, booked as ok"
    return difference


def alert_state(appliance: Appliance, name: str) -> str:
    """`pending` or `firing` when Prometheus or its rules say so, else empty."""
    host, _, port = appliance.prometheus.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", "/api/v1/alerts")
        alerts = json.load(connection.getresponse())["data"]["alerts"]
    except (OSError, http.client.HTTPException, ValueError):
        return ""
    finally:
        connection.close()
    states = {one["state"] for one in alerts if one["labels"]["alertname"] == name}
    return "firing" if "firing" in states else "pending" if "pending" in states else ""


def keep(proof: Proof, table: Path = TABLE) -> None:
    """Adds the row to the results, from which `scripts/reliability-table` writes docs/reliability.md."""
    rows = json.loads(table.read_text()) if table.exists() else {}
    rows[proof.fault] = vars(proof)
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(rows, indent=1))
