"""Every query that speaks of vLLM or its supervisor, asked while the real engine answers calls."""

import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from grafana import queries
from tests.doubles.edge_running import needs_nginx
from tests.doubles.monitored import Monitored, monitored
from tests.doubles.monitoring import families, needs_prometheus
from tests.doubles.waiting import wait_until
from tests.engine.conftest import RealEngine

pytestmark = [needs_nginx, needs_prometheus, pytest.mark.timeout(1800)]  # the first may wait for the engine's start

# What even the real engine does not show in a minute of good health, with the reason.
WELL = "empty while all is well"
QUIET = {
    "Engine: Rejections by reason": "a series is born with the first rejection",
    "Every board: annotation Engine restarts": WELL,
}


@pytest.fixture(scope="module")
def stack(engine: RealEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    with ExitStack() as started:
        status = f"127.0.0.1:{engine.status_port}"
        running = started.enter_context(monitored(folder, engine.url, engine.api_key, engine.model, engine=status))
        running.traffic(6)
        recorded = "engine:prefix_cache_hits_per_queries:ratio_rate5m >= 0"
        wait_until("the recordings have values", lambda: running.prometheus.query(recorded))
        canaries = "rate(engine_canary_seconds_count[1m]) > 0"  # sent while the engine is idle
        wait_until("canaries are counted", lambda: running.prometheus.query(canaries))
        yield running


def of_the_engine(family: str) -> bool:
    """Whether vLLM or the supervisor exports it, or it is recorded from theirs."""
    return family.startswith(("vllm:", "engine_", "engine:"))


def test_every_query_about_the_engine_gives_data(stack: Monitored) -> None:
    asked = [
        one
        for one in queries.asked("1m")
        if one.source == "prometheus"
        and one.name not in QUIET
        and (one.board == "Engine" or any(map(of_the_engine, families(one.expr))))
    ]
    assert len(asked) > 35
    assert stack.blank({f"{one.name}: {one.expr}": one.expr for one in asked}) == []


def test_every_family_of_rules_about_the_engine_is_exported(stack: Monitored) -> None:
    known = set(stack.prometheus.get("label/__name__/values"))
    page = stack.pages()
    declared = set(re.findall(r"^# TYPE (\S+)", page, re.M))
    blind = set()
    for group in stack.prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            for family in filter(of_the_engine, families(rule["query"])):
                # A counter without a series yet is declared all the same.
                if family not in known and not {family, family.removesuffix("_total")} & declared:
                    blind.add(family)
    assert blind == set()


def test_no_family_of_the_supervisor_is_without_a_panel(stack: Monitored) -> None:
    asked = {family for one in queries.asked() if one.source == "prometheus" for family in families(one.expr)}
    exported = set(re.findall(r"^# TYPE (engine_\w+?)(?:_created)? ", stack.pages(), re.M))
    assert len(exported) > 5
    forms = ("", "_total", "_bucket")
    assert {f for f in exported if not {f.removesuffix("_total") + form for form in forms} & asked} == set()


def test_no_alert_fires_on_a_healthy_engine(stack: Monitored) -> None:
    component = {
        alert["labels"]["alertname"]
        for alert in stack.prometheus.get("alerts")["alerts"]
        if alert["labels"].get("component") == "engine"
    }
    assert component == set()
