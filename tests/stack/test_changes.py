"""What changes under a running appliance without breaking it: its certificate, its names, its clock. No call may notice."""

import json
import os
import ssl
import time
from pathlib import Path

import pytest
from tests.doubles.wall_clock import WallClock, needs_compiler
from tests.stack import harm
from tests.stack.alarms import Alarms
from tests.stack.appliance import FILES, NOTES, Appliance
from tests.stack.load import Load
from tests.stack.proof import Proof, inflict
from tests.stack.test_faults import needs_our_docker
from tests.stack.waiting import until

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="breaking what lies under the containers needs root"),
]
KEEPER = 90  # seconds, as docs/reliability.md promises: the keeper looks every minute, nginx every five seconds
LOOK_UP = 10.0  # seconds that a look-up alone would take while names are silent


def unnoticed(proof: Proof) -> None:
    """No call failed, was refused or had to be made again."""
    assert (proof.lost, proof.refused, proof.seconds_to_recover) == (0, 0, 0.0), proof


def served(address: tuple[str, int]) -> str:
    """The certificate that is served now; empty while nobody answers."""
    try:
        return ssl.get_server_certificate(address, timeout=10)
    except OSError:
        return ""


def test_certificate_replaced_while_serving(appliance: Appliance, alarms: Alarms) -> None:
    """The operator's new pair is served within a minute and a half; streams that run across the change go on."""
    address = ("127.0.0.1", appliance.edge.port)
    old = until("a certificate is served", lambda: served(address), 60)
    folder = Path(appliance.settings["CERTIFICATES_DIR"])

    def replaced() -> float:
        struck = time.monotonic()
        harm.replace_certificate(folder, days=1)
        with Load(appliance.edge, callers=2, tokens=200, patience=600) as streams:
            until("the new certificate is served", lambda: served(address) not in ("", old), KEEPER)
            seen = time.monotonic()
            NOTES.append(f"stack: the operator's certificate was served {seen - struck:.0f} s after it was put there")
            until("calls go on", lambda: len(streams.whole_since(seen)) >= 2, 600)
            across = [call for call in streams.calls if call.began < seen < call.ended]
        assert across, "no stream ran across the change"
        broken = [(c.stream, round(c.ended - c.began), c.answer) for c in streams.calls if not c.whole]
        assert not broken, broken
        longest = max(call.ended - call.began for call in streams.calls)
        NOTES.append(f"stack: {len(streams.calls)} calls of 200 tokens across that change took up to {longest:.0f} s")
        return struck

    try:
        proof = inflict(
            appliance, alarms, "certificate: replaced (by one that ends tomorrow)", replaced,
            within=0, alert="CertificateEnding/edge",
        )  # fmt: skip
    finally:
        for name in ("privkey.pem", "fullchain.pem"):
            (folder / name).unlink(missing_ok=True)  # the keeper goes back to one of its own
    unnoticed(proof)


@pytest.mark.parametrize(
    ("how", "turns", "lasts"),
    [pytest.param("not answered for 25 s", 1, 25.0), pytest.param("each answer 5 s late", 4, 5.0, marks=pytest.mark.long)],
    ids=["silent", "late"],
)  # fmt: skip
def test_names_are_slow(appliance: Appliance, alarms: Alarms, how: str, turns: int, lasts: float) -> None:
    """Neither nginx nor the gateway waits for Docker's names: calls in flight and new ones go on."""
    needs_our_docker()
    with Load(appliance.edge, callers=12) as usual:
        until("callers are answered", lambda: len(usual.whole_since(0)) >= 24, 240)
    # What a call may take is measured, not promised: as long as among as many callers before, and no look-up on top.
    patience = max(call.ended - call.began for call in usual.calls) + LOOK_UP * 0.8

    def turn() -> None:
        began = time.monotonic()
        # What is kept from an earlier look-up runs out (10 s), then more callers come than there are connections.
        until("the names are old", lambda: time.monotonic() - began > lasts / 2, lasts)
        with Load(appliance.edge, callers=8) as more:
            until("it lasts", lambda: time.monotonic() - began > lasts, lasts * 2)
        assert all(call.whole for call in more.calls), [c.answer for c in more.calls if not c.whole]
        assert max(call.ended - call.began for call in more.calls) < patience

    proof = inflict(
        appliance, alarms, f"names: {how}", lambda: harm.silence_names([turn] * turns),
        within=0, no_alert="no call feels it", longest=patience,
    )  # fmt: skip
    unnoticed(proof)


@pytest.mark.long
@needs_compiler
def test_clock_stepped(appliance: Appliance, alarms: Alarms, tmp_path: Path) -> None:
    """The gateway's time of day jumps by an hour and by a day, both ways (limits: tests/integration/test_clock_steps.py)."""
    clock = WallClock(tmp_path, seen_as=Path("/clock"))
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755)
    more = {"services": {"gateway": {"environment": clock.environment, "volumes": [f"{tmp_path}:/clock:ro"]}}}
    override = tmp_path / "clock.json"
    override.write_text(json.dumps(more))
    appliance.files = (*FILES, str(override))
    again = ("up", "--detach", "--no-build", "--no-deps", "gateway")
    appliance.compose(*again)
    try:
        until("a call would be admitted", appliance.edge.ready, 180, every=0.5)
        for step in (3600, -3600, 86400, -86400):
            proof = inflict(
                appliance, alarms, f"clock: stepped by {'a day' if abs(step) > 3600 else 'an hour'}, {'on' if step > 0 else 'back'}",
                lambda step=step: clock.step(step), lambda: clock.step(0),  # type: ignore[misc]
                harm_is_felt=lambda load, step=step: on_the_new_time(appliance, step, load),  # type: ignore[misc]
                within=0, no_alert="no limit, lease or bill follows it",
            )  # fmt: skip
            unnoticed(proof)
    finally:
        appliance.files = FILES
        appliance.compose(*again)
        until("a call would be admitted", appliance.edge.ready, 180, every=0.5)


def on_the_new_time(appliance: Appliance, step: int, load: Load) -> None:
    """Calls that begin after the step are answered, and booked at the time that the gateway now believes."""
    began = time.monotonic()
    until("calls go on", lambda: len(load.whole_since(began)) >= 5, 240)
    names = {call.answer.request_id for call in load.whole_since(began)}

    def booked() -> list[float]:
        records = [record for record in appliance.ledger() if record["request_id"] in names]
        return [float(str(record["started_at"])) for record in records] if len(records) == len(names) else []

    away = [moment - time.time() for moment in until("they are in the ledger", booked, 60)]
    assert all(abs(one - step) < 600 for one in away), f"the clock was stepped by {step} s, the calls by {away}"
