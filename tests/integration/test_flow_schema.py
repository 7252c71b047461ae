"""Bodies generated from vLLM's own OpenAPI, valid and not, against the gateway: no failure of ours, no crash, no leak."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from tests.doubles.flow_site import at_rest, query
from tests.doubles.gateway import Answer, GatewayProcess
from tests.doubles.vllm import VllmDouble
from tests.doubles.vllm_openapi import recorded

MEGABYTE = 1024 * 1024
OURS = {"/tokenize": "/v1/tokenize", "/detokenize": "/v1/detokenize"}


def strategy(mode: GenerationMode) -> st.SearchStrategy[Any]:
    """Cases of all routes: what fits vLLM's description, or what does not."""
    schema = schemathesis.openapi.from_dict(recorded())
    return st.one_of([found.ok().as_strategy(generation_mode=mode) for found in schema.get_all_operations()])


def sent(case: Any, ours: bool) -> bytes:
    """The body as bytes; with `ours` it names a model that is served, without which it would not come far."""
    body = case.body
    if isinstance(body, bytes):
        return body
    if ours and isinstance(body, dict):
        body = {**body, "model": "double"}
    try:
        return json.dumps(body).encode()
    except TypeError:  # an invalid case may hold what JSON cannot say
        return repr(body).encode()


def drive(gateway: GatewayProcess, mode: GenerationMode, cases: int) -> Counter[tuple[str, int]]:
    """Send `cases` bodies and look at each answer; how many of each route were answered how."""
    seen: Counter[tuple[str, int]] = Counter()

    @settings(
        max_examples=cases,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=[Phase.generate],
    )
    @given(strategy(mode), st.integers(0, 9))
    def check(case: Any, luck: int) -> None:
        path = OURS.get(case.path, case.path)
        body = sent(case, ours=luck > 0)
        answer = gateway.post(path, body)
        seen[path, answer.status] += 1
        assert answer.status < 500, (path, body[:2000], answer.body)
        if answer.status != 200:
            assert {"message", "type"} <= set(error_of(answer)), (path, body[:2000], answer.body)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generator's, about schemas of such a size
        check()
    return seen


def error_of(answer: Answer) -> dict[str, Any]:
    error: dict[str, Any] = answer.json["error"]
    return error


def memory(gateway: GatewayProcess) -> float:
    """Resident megabytes."""
    assert gateway.process is not None
    return psutil.Process(gateway.process.pid).memory_info().rss / MEGABYTE


def unharmed(gateway: GatewayProcess, engine: VllmDouble) -> None:
    """The gateway works as before, holds nothing, and has complained of nothing."""
    assert gateway.chat().status == 200
    at_rest(gateway, engine, seconds=3.0)
    assert not [line for line in gateway.lines if str(line.get("level")).lower() in ("error", "critical")]
    rows = query(gateway, "SELECT COUNT(*) AS n, COUNT(DISTINCT request_id) AS ids FROM usage_records")[0]
    assert rows["n"] == rows["ids"]


def test_what_vllm_describes_is_answered_or_refused(gateway: GatewayProcess, engine: VllmDouble) -> None:
    fit = drive(gateway, GenerationMode.POSITIVE, 80)
    unfit = drive(gateway, GenerationMode.NEGATIVE, 20)

    assert sum(count for (_, status), count in fit.items() if status == 200) >= 5, fit
    assert sum(count for (_, status), count in unfit.items() if status == 400) >= 5, unfit
    unharmed(gateway, engine)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_thousand_bodies_of_vllms_own_description(gateway: GatewayProcess, engine: VllmDouble) -> None:
    """As many as can be made in minutes: one takes a tenth of a second of a processor, and more the longer a run is.
    Ten thousand bodies that cost less to make are sent by `test_ten_thousand_random_bodies`."""
    drive(gateway, GenerationMode.POSITIVE, 200)
    before = memory(gateway)
    seen: Counter[tuple[str, int]] = Counter()
    for _ in range(4):  # short runs: the generator remembers what it has made
        seen += drive(gateway, GenerationMode.POSITIVE, 400) + drive(gateway, GenerationMode.NEGATIVE, 100)
    more = memory(gateway) - before
    statuses: Counter[int] = Counter()
    for (_, status), count in seen.items():
        statuses[status] += count
    print(f"{seen.total()} bodies: {dict(statuses)}; {more:+.1f} MB")
    assert more < 16, "megabytes"
    assert seen.total() >= 1_800  # a body that came before is not sent again
    assert {path for path, _ in seen} == {OURS.get(path, path) for path in recorded()["paths"]}
    unharmed(gateway, engine)
