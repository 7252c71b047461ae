"""What promtail.yml makes of log lines, and that Loki, Jaeger and it are set so that nothing is lost or unbounded."""

import json
import os
import re
import subprocess
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.doubles.promtail import CONFIG, Promtail

from gateway.keys import new_key_id

ROOT = Path(__file__).parents[2]
CALL = {
    "time": "2026-11-23T07:00:00.000000+00:00",
    "level": "INFO",
    "event": "call_closed",
    "request_id": "req-1",
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
    "key_id": new_key_id(),
    "model": "m",
}
EDGE = (
    '{"time":"2026-11-23T07:00:00+00:00","service":"nginx","event":"edge_request","request_id":"abc12345",'
    '"client":"10.0.0.1","method":"POST","path":"/v1/chat/completions","protocol":"HTTP/2.0","status":%d,'
    '"bytes_in":100,"bytes_out":2048,"seconds":%s,"upstream_seconds":"-","upstream_status":"","tls":"TLSv1.3",'
    '"traceparent":"%s","user_agent":"curl"}'
)


def ship(service: str, *lines: str) -> list[Any]:
    """The entries of these lines."""
    return Promtail().ship(service, lines)


def test_a_call_is_found_by_request_trace_and_key_without_being_indexed_by_them() -> None:
    (entry,) = ship("gateway", json.dumps(CALL))
    assert entry.labels == {"service": "gateway", "level": "info"}
    assert entry.metadata == {name: CALL[name] for name in ("request_id", "trace_id", "key_id", "event")}
    assert json.loads(entry.line) == CALL


def raised() -> str:
    """A chained traceback as Python prints it."""
    try:
        try:
            {}["missing"]
        except KeyError as error:
            raise ValueError("first line\nsecond line of the message") from error
    except ValueError:
        return traceback.format_exc()
    raise AssertionError


@pytest.mark.parametrize("service", ["gateway", "vllm", "gpu-exporter", "init"])
def test_a_traceback_is_not_torn_and_does_not_swallow_its_neighbours(service: str) -> None:
    text = raised()
    entries = ship(
        service, json.dumps(CALL), *text.splitlines(), json.dumps(CALL), "INFO 11-23 07:00:00 [a.py:1] go on"
    )
    first, *pieces, last, plain = (entry.line for entry in entries)
    assert json.loads(first) == json.loads(last) == CALL
    assert "\n".join(pieces) == text.rstrip("\n")
    # One entry a traceback; the one that caused it is an entry of its own.
    assert len(pieces) == text.count("Traceback (most recent call last)") == 2
    assert pieces[-1].endswith("ValueError: first line\nsecond line of the message")
    assert plain.startswith("INFO")


def test_vllms_own_lines_start_entries() -> None:
    lines = [
        "(EngineCore_0 pid=12) INFO 11-23 07:00:00 [core.py:58] Initializing",
        "(EngineCore_0 pid=12) Traceback (most recent call last):",
        "[2026-11-23 07:00:00] INFO:     Started server process",
        "INFO:     Application startup complete.",
        "WARNING 11-23 07:00:00 [utils.py:1] careful",
    ]
    assert [entry.line for entry in ship("vllm", *lines)] == lines


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer sk-proj-0123456789abcdef", "0123456789abcdef"),
        ("headers {'authorization': 'bearer abcdefgh12345678'}", "abcdefgh12345678"),
        ("token hf_abcdefghijklmnopqrstuvwxyz in use", "abcdefghijklmnopqrstuvwxyz"),
        ("key sk-0123456789abcdef0123 was used", "0123456789abcdef0123"),
    ],
)
def test_what_looks_like_a_secret_does_not_arrive(text: str, secret: str) -> None:
    for line in (text, json.dumps({**CALL, "text": text})):
        (entry,) = ship("gateway", line)
        assert secret not in entry.line
        assert "***" in entry.line


def test_the_edges_log_becomes_metrics() -> None:
    promtail = Promtail()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    entries = promtail.ship("nginx", [EDGE % (200, "0.120", trace), EDGE % (502, "0.001", ""), EDGE % (503, "4", "")])
    page = promtail.serve()
    try:
        samples = {
            (sample.name, sample.labels.get("class"), sample.labels.get("le")): sample.value
            for family in text_string_to_metric_families(_get(page.address))
            for sample in family.samples
        }
    finally:
        page.close()
    assert samples["edge_requests_total", "2xx", None] == 1
    assert samples["edge_requests_total", "5xx", None] == 2
    assert samples["edge_request_seconds_bucket", "2xx", "0.25"] == 1
    assert samples["edge_request_seconds_bucket", "5xx", "1.0"] == 1
    assert samples["edge_request_seconds_count", "5xx", None] == 2
    assert samples["edge_sent_bytes_total", "5xx", None] == 4096
    assert [entry.labels for entry in entries] == [{"service": "nginx"}] * 3
    assert entries[0].metadata["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert entries[0].metadata["request_id"] == "abc12345"
    assert "trace_id" not in entries[1].metadata


def _get(address: str) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        return answer.read().decode()


def test_the_fields_of_the_edges_log_are_those_that_nginx_writes() -> None:
    written = set(re.findall(r'"(\w+)":', EDGE))
    for path in ROOT.glob("nginx/nginx.conf*"):
        text = path.read_text()
        assert set(re.findall(r'"(\w+)":', text.partition("log_format edge")[2].partition(";")[0])) == written


@settings(max_examples=60, deadline=None)
@given(
    service=st.sampled_from(["gateway", "nginx", "vllm", "loki", "anything"]),
    lines=st.lists(
        st.one_of(
            st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=200),
            st.dictionaries(st.sampled_from([*CALL, "status", "seconds"]), st.text(max_size=20)).map(json.dumps),
        ),
        max_size=8,
    ),
)
def test_whatever_is_logged_two_labels_are_all_there_is(service: str, lines: list[str]) -> None:
    plain = [re.sub(r'"(status|seconds)": "[^"]*"', r'"\1": 1', line) for line in lines]
    for entry in ship(service, *plain):
        assert entry.labels.keys() <= {"service", "level"}
        assert entry.labels["service"] == service


class TestFile:
    """The file stays inside what Promtail 3.6 and Alloy's converter both understand."""

    config = yaml.safe_load(CONFIG.read_text())

    def stages(self, of: list[dict[str, Any]] | None = None) -> list[tuple[str, Any]]:
        """All stages, nested ones too."""
        found: list[tuple[str, Any]] = []
        for stage in self.config["scrape_configs"][0]["pipeline_stages"] if of is None else of:
            ((name, options),) = stage.items()
            found.append((name, options))
            if name == "match":
                found += self.stages(options["stages"])
        return found

    def test_top_level(self) -> None:
        assert self.config.keys() == {"server", "positions", "clients", "scrape_configs"}
        assert "http_path_prefix" not in self.config["server"]
        assert self.config["server"]["log_level"] == "info"  # another one is a warning to the converter

    def test_stages(self) -> None:
        known = {"match", "multiline", "replace", "json", "template", "labels", "structured_metadata"}
        known |= {"regex", "metrics", "labeldrop"}
        assert {name for name, _ in self.stages()} <= known

    def test_expressions_are_re2(self) -> None:
        for name, options in self.stages():
            if name in ("replace", "regex", "multiline"):
                expression = options.get("expression", options.get("firstline"))
                assert not re.search(r"\(\?(=|!|<=|<!|P=)|\\[1-9]", expression), f"not in RE2: {expression}"

    def test_metrics_have_a_name_and_a_life_that_do_not_depend_on_the_program(self) -> None:
        metrics = [metric for name, options in self.stages() if name == "metrics" for metric in options.values()]
        assert metrics
        for metric in metrics:
            assert metric["prefix"] == "edge_"
            assert metric["max_idle_duration"] == "8760h"

    def test_it_keeps_trying_for_longer_than_an_outage_of_ten_minutes(self) -> None:
        backoff = self.config["clients"][0]["backoff_config"]
        assert (backoff["min_period"], backoff["max_period"]) == ("500ms", "30s")
        waits = [min(0.5 * 2**number, 30) for number in range(backoff["max_retries"])]
        # The programs wait a random time up to these; half of the sum is the mean.
        assert sum(waits) / 2 > 40 * 60

    def test_loki_takes_what_comes_late_and_forgets_in_time(self) -> None:
        loki = yaml.safe_load((ROOT / "loki/loki.yml").read_text())
        limits = loki["limits_config"]
        assert limits["allow_structured_metadata"] is True
        assert limits["reject_old_samples_max_age"] == "168h"
        assert loki["compactor"]["retention_enabled"] is True
        assert limits["retention_period"] == "744h"
        (schema,) = loki["schema_config"]["configs"]
        assert (schema["schema"], schema["store"], schema["index"]["period"]) == ("v13", "tsdb", "24h")
        assert loki["analytics"]["reporting_enabled"] is False
        assert loki["ingester"]["wal"]["enabled"] is True

    def test_jaeger_keeps_its_traces_over_a_restart_and_not_for_ever(self) -> None:
        jaeger = yaml.safe_load((ROOT / "jaeger/jaeger.yml").read_text())
        badger = jaeger["extensions"]["jaeger_storage"]["backends"]["spans"]["badger"]
        assert badger["ephemeral"] is False
        assert badger["ttl"]["spans"] == "168h"
        service = jaeger["service"]
        assert set(service["extensions"]) == set(jaeger["extensions"])
        for kind in ("receivers", "processors", "exporters"):
            assert set(service["pipelines"]["traces"][kind]) == set(jaeger[kind])
        assert jaeger["exporters"]["jaeger_storage_exporter"]["trace_storage"] == "spans"
        assert jaeger["extensions"]["jaeger_query"]["storage"]["traces"] == "spans"
        # The image's default is localhost: every listener says that it is for the network.
        text = (ROOT / "jaeger/jaeger.yml").read_text()
        assert "localhost" not in text
        for listener in re.findall(r"endpoint: (\S+)", text):
            assert listener.startswith("0.0.0.0:")


def started(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `promtail/start` with a program in Alloy's place that says how it was called."""
    program = tmp_path / "alloy"
    program.write_text('#!/bin/sh\necho "alloy $*"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROMTAIL_CONFIG": str(tmp_path / "written.yml")}
    return subprocess.run(
        [str(CONFIG.parent / "start"), "run", "--it"], env={**environment, **variables}, capture_output=True, text=True
    )


@pytest.mark.parametrize("project", ["appliance", "llm2"])
def test_containers_of_this_project_are_read_whatever_its_name(tmp_path: Path, project: str) -> None:
    done = started(tmp_path, COMPOSE_PROJECT_NAME=project)
    assert (done.returncode, done.stdout) == (0, "alloy run --it\n")
    written = yaml.safe_load((tmp_path / "written.yml").read_text())
    [discovery] = written["scrape_configs"][0].pop("docker_sd_configs")
    assert discovery["filters"] == [{"name": "label", "values": [f"com.docker.compose.project={project}"]}]
    ours = yaml.safe_load(CONFIG.read_text())
    del ours["scrape_configs"][0]["docker_sd_configs"]
    assert written == ours


def test_what_is_no_projects_name_is_refused(tmp_path: Path) -> None:
    done = started(tmp_path, COMPOSE_PROJECT_NAME="a/b")
    assert done.returncode == 2
    assert "COMPOSE_PROJECT_NAME" in done.stderr
