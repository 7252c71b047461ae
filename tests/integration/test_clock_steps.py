"""The machine's clock is stepped by an hour or a day, both ways, while the gateway runs: no limit is lost or locked."""

import threading
import time
from pathlib import Path

import pytest
from tests.doubles.gateway import Answer, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until
from tests.doubles.wall_clock import WallClock, needs_compiler

from gateway.store import Database

HOUR, DAY = 3_600, 86_400
QUOTA = 300
pytestmark = needs_compiler


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


def spend(gateway: GatewayProcess) -> int:
    """Calls until the day is used up; how many were answered."""
    for answered in range(QUOTA):
        answer = gateway.chat("double:tokens=10,pace_ms=0", max_tokens=12)
        if answer.status != 200:
            assert (answer.status, answer.code) == (429, "quota_exhausted"), answer.body
            return answered
    raise AssertionError("the quota does not end")


def admitted(gateway: GatewayProcess) -> tuple[int, Answer]:
    """Calls until the minute is used up: how many were answered, and the refusal."""
    for answered in range(QUOTA):
        answer = gateway.chat("double:tokens=1")
        if answer.status != 200:
            assert answer.code == "rate_limit_exceeded", answer.body
            return answered, answer
    raise AssertionError("the limit does not hold")


def spent(gateway: GatewayProcess) -> dict[str, int]:
    """Tokens by day, as the ledger has them."""
    with Database(gateway.environment["DATABASE_URL"]).session() as database:
        text = "SELECT day, SUM(prompt_tokens + completion_tokens) FROM usage_records GROUP BY day"
        return dict(database.rows(text))


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(DAY, id="day"),
        pytest.param(-DAY, id="-day"),
        pytest.param(HOUR, id="hour", marks=pytest.mark.long),
        pytest.param(-HOUR, id="-hour", marks=pytest.mark.long),
        pytest.param(40 * DAY, id="40-days", marks=pytest.mark.long),
    ],
)
def test_a_day_that_was_spent_stays_spent(clock: WallClock, step: int) -> None:
    """Whatever days the clock visits meanwhile, and wherever the gateway was started."""
    with (
        VllmDouble(model="double") as engine,
        GatewayProcess(VLLM_URL=engine.url, DEFAULT_DAILY_TOKENS=QUOTA, **clock.environment) as gateway,
    ):
        assert spend(gateway) > 0
        clock.step(step)
        spend(gateway)
        clock.step(0)
        assert spend(gateway) == 0, "the step gave today's tokens again"
        # The same, if it was started while the clock was wrong.
        clock.step(step)
        gateway.kill()
        gateway.start()
        assert spend(gateway) == 0
        clock.step(0)
        assert spend(gateway) == 0, "a start on the wrong day forgot today"
        used = spent(gateway)
        assert max(used.values()) <= QUOTA, used
        assert sum(used.values()) == sum(r["prompt_tokens"] + r["completion_tokens"] for r in engine.requests())


def test_what_runs_across_a_step_ends_well_and_the_minute_is_measured_by_another_clock(clock: WallClock) -> None:
    """A step neither opens a rate limit nor locks a key out; a lease is not over because the date is another."""
    settings = {"DEFAULT_REQUESTS_PER_MINUTE": 60, "HOLD_SECONDS": 2}
    with (
        VllmDouble(model="double") as engine,
        GatewayProcess(VLLM_URL=engine.url, **settings, **clock.environment) as gateway,
    ):
        running: list[Answer] = []
        fields = {"max_tokens": 100, "stream": True, "stream_options": {"include_usage": True}}
        caller = threading.Thread(
            target=lambda: running.append(gateway.chat("double:tokens=90,wait_after=30", **fields))  # type: ignore[arg-type]
        )
        caller.start()
        wait_until("the engine works on it", lambda: engine.requests() and not running)
        for step in (HOUR, -HOUR, DAY, -DAY):
            admitted(gateway)
            used_up = time.monotonic()
            clock.step(step)
            more, answer = admitted(gateway)
            # A call a second comes back by itself; a limit that was opened lets the whole minute in.
            assert more <= 1 + time.monotonic() - used_up, f"the step {step} opened the limit"
            advised = float(answer.headers["retry-after"])
            assert 0 < advised <= 2, f"the step {step} locks the key out"
            wait_until("a call is admitted", lambda: gateway.chat("double:tokens=1").status == 200)
        assert not running, "the stream was to run across all steps"
        engine.go_on()
        caller.join(60)
        (whole,) = running
        assert whole.status == 200
        assert whole.body.endswith(b"data: [DONE]\n\n")
        closed = gateway.closed(whole.headers["x-request-id"])
        assert closed["outcome"] == "ok"
        assert 1 < closed["duration_seconds"] < HOUR / 2, closed
        with Database(gateway.environment["DATABASE_URL"]).session() as database:
            assert database.rows("SELECT COUNT(*) FROM holds") == [(0,)]
            assert database.rows("SELECT COUNT(*) FROM usage_records WHERE outcome = 'lost'") == [(0,)]
            ids = [row[0] for row in database.rows("SELECT request_id FROM usage_records")]
            assert ids.count(whole.headers["x-request-id"]) == 1


def test_keys_and_health_survive_a_step(clock: WallClock) -> None:
    """The engine's health goes on by the other clock; a key's own end follows the new time."""
    with VllmDouble(model="double") as engine, GatewayProcess(VLLM_URL=engine.url, **clock.environment) as gateway:
        made = gateway.admin("POST", "/admin/keys", {"name": "short", "expires_at": time.time() + DAY})
        short = made.json["secret"]
        for step in (-DAY, 2 * DAY, 0):
            clock.step(step)
            wait_until("ready", lambda: gateway.get("/ready").status == 200)
            assert gateway.chat("double:tokens=1").status == 200
            assert gateway.chat("double:tokens=1", key=short).status == (403 if step == 2 * DAY else 200)
