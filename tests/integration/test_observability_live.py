"""Every query of every panel, rule and alert against a real Prometheus that scrapes the real programs under traffic."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from grafana import queries
from tests.doubles.edge_running import needs_nginx
from tests.doubles.gateway import KEY
from tests.doubles.monitored import Monitored, monitored
from tests.doubles.monitoring import families, needs_prometheus, prometheus
from tests.doubles.promtail import Promtail
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

ROOT = Path(__file__).parents[2]
pytestmark = [needs_nginx, needs_prometheus, pytest.mark.timeout(400)]

# Families that this run cannot have, with the reason. A family that does appear must not be listed (see the last test).
LOG_SHIPPER = "of the program that ships logs: neither Alloy nor Promtail can be had on every machine"
ELSEWHERE = "of the real vLLM; its double leaves it out, tests/engine asks the real one"
FAULT = "only after a fault"
HARDWARE = "only on GPUs that have it; the simulated ones do not"
WITHOUT = {
    "loki_write_.*|promtail_.*": LOG_SHIPPER,
    "otelcol_.*": "of Jaeger, which cannot be had on every machine",
    "alertmanager_.*": "of Alertmanager, which has tests of its own",
    "engine:prefix_cache_hits_per_queries:ratio_rate5m": "the double has no prefix cache",
    "engine_.*": "of the engine's supervisor, which runs in tests/engine",
    "vllm:(admission_rejections|prompt_tokens_by_source)_total": ELSEWHERE,
    "vllm:(time_to_first_token|inter_token_latency|e2e_request_latency)_seconds.*": ELSEWHERE,
    "vllm:request_(queue|prefill|decode)_time_seconds.*": ELSEWHERE,
    "vllm:request_(prompt|generation)_tokens.*": ELSEWHERE,
    "gpu_mig_(memory|graphics|sm|tensor|dram)_.*|gpu_mig_mode_pending": HARDWARE,
    "gpu_(bar1|retired|fan|process|violation|nvlink_links|nvlink_speed).*": HARDWARE,
    "gpu_nvlink_(transmit|receive)_bytes_per_second": HARDWARE,
    "gpu_pcie_(errors_total|throughput_bytes_per_second|replay_rollovers_total)": HARDWARE,
    "gpu_(clock_event_seconds_total|ecc_mode_pending|row_remap_banks)": HARDWARE,
    "gpu_temperature_(limit_margin|threshold)_celsius": HARDWARE,
    "gpu_xid_.*": FAULT,
    "gpu_exporter_call_failures_total": FAULT,
    "gateway_energy_joules_total": "needs GPU_EXPORTER_URL and minutes of calls",
}
# Panels and queries whose families are there and which are rightly empty here, with the reason.
WELL = "empty while all is well"
QUIET = {
    "Gateway: Tried again": WELL,
    "GPUs: Throttling now": WELL,
    "GPUs: Time slowed down": WELL,
    "Every board: annotation Engine restarts": WELL,
    "Every board: annotation Pages": WELL,
    "Every board: annotation Restarts": WELL,
    "Every board: annotation Deploys": "empty once the gateway has run for two minutes",
    "Engine: CPU": "as Memory",
    "time() - (gpu_exporter_last_hang_timestamp_seconds > 0)": "only after a driver call hung",
    "Engine: Memory": "of vLLM and its supervisor, which run in tests/engine; the double is one process with the test",
}


def reason(family: str) -> str | None:
    """Why this run has no such family; None when it must have it."""
    return next((why for pattern, why in WITHOUT.items() if re.fullmatch(pattern, family)), None)


SETTLED = "gateway:bad_per_calls:ratio_rate3d >= 0 and gateway:late_per_streams:ratio_rate3d >= 0"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("live")
    with ExitStack() as started:
        engine = started.enter_context(VllmDouble(api_key="engine-secret"))
        running = started.enter_context(monitored(folder, engine.url, "engine-secret", "double", engine))
        running.traffic(4)
        wait_until("the slowest recording has a value", lambda: running.prometheus.query(SETTLED))
        yield running


def test_every_query_of_every_panel_gives_data(stack: Monitored) -> None:
    asked = [
        one
        for one in queries.asked("1m")
        if one.source == "prometheus"
        and not {one.name, one.expr} & QUIET.keys()
        and not any(reason(family) for family in families(one.expr))
    ]
    assert len(asked) > 100
    blank = stack.blank({f"{one.name}: {one.expr}": one.expr for one in asked})
    assert blank == []


def test_every_rule_is_evaluated_without_an_error_and_speaks_of_something(stack: Monitored) -> None:
    wait_until(
        "every rule was evaluated",
        lambda: all(
            rule["health"] != "unknown" for g in stack.prometheus.get("rules")["groups"] for rule in g["rules"]
        ),
    )
    blind: list[str] = []
    known = set(stack.prometheus.get("label/__name__/values"))
    for group in stack.prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            assert rule["health"] == "ok", f"{rule['name']}: {rule.get('lastError')}"
            blind += [f"{rule['name']}: {f}" for f in families(rule["query"]) if f not in known and not reason(f)]
    assert blind == []


def test_every_recording_has_a_value(stack: Monitored) -> None:
    recorded = [
        rule
        for path in (ROOT / "prometheus/rules").glob("*.yml")
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule and not any(reason(family) for family in {rule["record"]} | families(rule["expr"]))
    ]
    assert len(recorded) > 25
    assert stack.blank({rule["record"]: rule["record"] for rule in recorded}) == []


def test_no_family_is_asked_for_that_nobody_exports(stack: Monitored) -> None:
    known = set(stack.prometheus.get("label/__name__/values"))
    asked = {family for one in queries.asked() if one.source == "prometheus" for family in families(one.expr)}
    assert sorted(family for family in asked if family not in known and not reason(family)) == []


def test_no_family_is_exported_that_nobody_looks_at(stack: Monitored) -> None:
    asked = {family for one in queries.asked() if one.source == "prometheus" for family in families(one.expr)}
    for path in (ROOT / "prometheus/rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                asked |= families(rule["expr"])
    page = stack.pages()
    exported = set(re.findall(r"^# TYPE ((?:gateway|engine|gpu|edge)_\w+?)(?:_created)? ", page, re.M))
    assert len(exported) > 60
    forms = ("", "_total", "_bucket", "_count", "_sum", "_info")
    unseen = {family for family in exported if not {family.removesuffix("_total") + form for form in forms} & asked}
    assert unseen == set()


def test_what_is_excused_is_really_absent(stack: Monitored) -> None:
    """An excuse that is no longer needed must go, or it would hide the next break."""
    known = set(stack.prometheus.get("label/__name__/values"))
    assert sorted(family for family in known if reason(family)) == []


def test_exemplars_carry_traces_that_the_collector_got(stack: Monitored) -> None:
    now = time.time()
    found = stack.prometheus.get(
        "query_exemplars",
        query="gateway_time_to_first_token_seconds_bucket",
        start=str(now - 300),
        end=str(now),
    )
    traces = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
    assert traces
    assert all(re.fullmatch("[0-9a-f]{32}", trace) for trace in traces)
    wait_until("their traces", lambda: all(bytes.fromhex(t) in b"".join(stack.collector.bodies) for t in traces))


def test_a_call_is_one_story_at_the_edge_in_the_gateway_and_in_its_trace(stack: Monitored) -> None:
    with stack.edge.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "double", "messages": [{"role": "user", "content": "hello"}], "stream": True},
            headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "x-request-id": "story-0123456789"},
        )
    assert answer.headers["x-request-id"] == "story-0123456789"
    at_edge = stack.edge.logged("story-0123456789")
    closed = stack.gateway.closed("story-0123456789")
    assert closed["trace_id"] == trace
    entries = Promtail().ship("nginx", [json.dumps(at_edge)]) + Promtail().ship("gateway", [json.dumps(closed)])
    assert {entry.metadata["request_id"] for entry in entries} == {"story-0123456789"}
    assert {entry.metadata["trace_id"] for entry in entries} == {trace}
    wait_until("the trace", lambda: any(bytes.fromhex(trace) in body for body in stack.collector.bodies))
    (seen,) = [one for one in stack.double.requests() if trace in json.dumps(one)][-1:] or [None]
    assert seen is not None, "vLLM did not get the trace context"


def test_series_stay_few(stack: Monitored) -> None:
    """All programs of a small appliance together; the alert SeriesGrowing waits at 150,000."""
    total = float(stack.prometheus.query("sum(scrape_samples_post_metric_relabeling)")[0]["value"][1])
    assert total < 6000


def test_faults_become_alerts_that_name_them(stack: Monitored, tmp_path: Path) -> None:
    """Last: it breaks the engine. Real faults, real rules without their waiting times."""
    jobs = {job: address for job, address in stack.addresses.items() if job in ("gateway", "vllm")}
    with prometheus(tmp_path, impatient=True, **jobs) as watcher:
        wait_until("both are scraped", lambda: len(watcher.query('up{job!="prometheus"} == 1')) == 2)
        wait_until("no alert", lambda: not {"BackendDown", "TargetDown"} & watcher.firing())
        stack.double.kill()
        wait_until("the alerts", lambda: {"BackendDown", "TargetDown"} <= watcher.firing())
        down = [alert for alert in watcher.get("alerts")["alerts"] if alert["labels"]["alertname"] == "TargetDown"]
        assert [alert["labels"]["component"] for alert in down] == ["vllm"]
        assert "vllm" in down[0]["annotations"]["summary"]
        assert stack.gateway.chat().status == 503
        stack.double.start()
        wait_until("they resolve", lambda: not {"BackendDown", "TargetDown"} & watcher.firing())
