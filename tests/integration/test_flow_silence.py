"""How long an engine may be silent in each phase of a call, and when its silence is everybody's business."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from tests.doubles.flow_site import PATHS, Wire, asking
from tests.doubles.gateway import GatewayProcess
from tests.doubles.machine import patience
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

GENERATING = ["chat", "completions", "messages", "responses"]
FAILURES = 3


@pytest.fixture(scope="module")
def patient(engine: VllmDouble) -> Iterator[GatewayProcess]:
    """Waits long for a first token, and not in the middle of an answer."""
    with GatewayProcess(
        VLLM_URL=engine.url, FIRST_BYTE_SECONDS=60, ANSWER_SECONDS=60, IDLE_SECONDS=0.5, KEEP_ALIVE_SECONDS=0.2
    ) as running:
        yield running


@pytest.fixture
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    """Gives everything up soon."""
    with GatewayProcess(
        VLLM_URL=engine.url, FIRST_BYTE_SECONDS=1, ANSWER_SECONDS=2, IDLE_SECONDS=1, KEEP_ALIVE_SECONDS=0,
        BREAKER_FAILURES=FAILURES, BREAKER_SECONDS=60,
    ) as running:  # fmt: skip
        yield running


@pytest.mark.parametrize("what", GENERATING)
def test_a_long_prompt_has_its_time_although_the_head_of_the_stream_has_come(
    patient: GatewayProcess, what: str
) -> None:
    """vLLM sends the head, and in one dialect two events, before it computes the prompt."""
    answer = patient.post(PATHS[what], asking(what, "prefill_ms=1500,tokens=9", stream=True))

    assert b": keep-alive\n\n" in answer.body
    assert b"upstream_timeout" not in answer.body
    assert b"brown" in answer.body


@pytest.mark.parametrize("what", GENERATING)
def test_after_the_first_token_silence_is_short(patient: GatewayProcess, what: str) -> None:
    began = time.monotonic()
    answer = patient.post(PATHS[what], asking(what, "tokens=20,hang_after=12", stream=True))

    assert b"server_error" in answer.body
    assert time.monotonic() - began < patience(10.0)


def test_an_answer_in_one_piece_may_take_longer_than_a_first_token(gateway: GatewayProcess) -> None:
    assert gateway.chat("double:prefill_ms=1400,tokens=3").status == 200
    assert gateway.chat("double:prefill_ms=1400,tokens=3", stream=True).body.count(b"upstream_timeout") == 1
    answer = gateway.chat("double:hang=headers")
    assert (answer.status, answer.code) == (504, "upstream_timeout")


def test_one_limit_that_is_set_holds_for_answers_in_one_piece_too(engine: VllmDouble) -> None:
    with GatewayProcess(VLLM_URL=engine.url, FIRST_BYTE_SECONDS=1) as running:
        assert running.chat("double:hang=headers").code == "upstream_timeout"


def test_who_waits_for_too_long_an_answer_does_not_stop_an_engine_that_answers_others(gateway: GatewayProcess) -> None:
    with Wire(gateway.port, PATHS["chat"], asking("chat", "tokens=100000,pace_ms=50", stream=True)) as flowing:
        flowing.read_until(b"brown")
        reader = threading.Thread(target=flowing.read_all, daemon=True)
        reader.start()
        assert hanging(gateway) == [504] * 2 * FAILURES
        assert gateway.chat("double:tokens=3").status == 200
        flowing.plain.shutdown(2)
        reader.join(patience(10.0))


def test_an_engine_that_hangs_for_everybody_is_found_without_any_stream(gateway: GatewayProcess) -> None:
    assert gateway.chat("double:tokens=3").status == 200
    assert hanging(gateway) == [504] * 2 * FAILURES

    assert gateway.chat().code == "no_backend"


def hanging(gateway: GatewayProcess) -> list[int]:
    """What becomes of calls for which the engine does nothing, at the same time."""
    statuses: list[int] = []
    calls = [
        threading.Thread(target=lambda: statuses.append(gateway.chat("double:hang=headers").status), daemon=True)
        for _ in range(2 * FAILURES)
    ]
    for call in calls:
        call.start()
    wait_until("they have ended", lambda: len(statuses) == len(calls))
    return statuses
