"""Alerts: each fires, stays quiet and resolves (promtool), and leads to a dashboard and a runbook that exist."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "prometheus/rules").glob("*.yml"))
TESTS = sorted((ROOT / "prometheus/tests").glob("*.yml"))
SEVERITIES = {"page", "ticket"}
ALWAYS = {"Watchdog"}  # fires as long as anybody could be told of anything
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on PATH (Debian: apt-get install prometheus)"
)


def rules(kind: str) -> Iterator[dict[str, Any]]:
    """All rules of `kind` (alert or record), each with the stem of its file under `file`."""
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if kind in rule:
                    yield {**rule, "file": path.stem}


ALERTS = {rule["alert"]: rule for rule in rules("alert")}


def anchors(path: Path) -> set[str]:
    """The headings of a markdown file as the anchors they get."""
    return {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", path.read_text(), re.M)}


def test_no_alert_name_is_used_twice() -> None:
    names = [rule["alert"] for rule in rules("alert")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_alert_says_what_happened_what_to_do_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    labels, notes = alert["labels"], alert["annotations"]
    assert labels["severity"] in ({"heartbeat"} if name in ALWAYS else SEVERITIES)
    assert labels["component"]
    assert len(notes["summary"]) > 15
    assert len(notes["action"]) > 15
    page, _, anchor = notes["runbook"].partition("#")
    assert anchor == name.lower()
    assert anchor in anchors(ROOT / page)
    # The runbooks are shown by Grafana, so that the link works on a machine that has nothing but the appliance.
    assert notes["runbook_url"] == f"http://127.0.0.1:3000/d/runbook-{Path(page).stem}"
    uid = notes["dashboard_url"].removeprefix("http://127.0.0.1:3000/d/")
    assert (ROOT / f"grafana/dashboards/{uid}.json").is_file()
    assert (ROOT / f"grafana/dashboards/runbook-{Path(page).stem}.json").is_file()


def test_every_runbook_heading_belongs_to_an_alert_and_is_complete() -> None:
    for path in sorted((ROOT / "docs/runbooks").glob("*.md")):
        for section in path.read_text().split("\n## ")[1:]:
            name = section.partition("\n")[0]
            assert name in ALERTS, f"{path.name}: no alert is called {name}"
            for part in ("Meaning", "First look", "Usual causes", "What to do", "It worked when"):
                assert f"**{part}" in section, f"{path.name}: {name} lacks “{part}”"


def test_every_alert_has_a_test_in_which_it_stays_quiet_fires_and_resolves() -> None:
    seen: dict[str, set[str]] = {}
    for path in TESTS:
        for case in yaml.safe_load(path.read_text())["tests"]:
            quiet_before = False
            checks = [*case.get("promql_expr_test", []), *case.get("alert_rule_test", [])]
            for check in sorted(checks, key=lambda check: seconds(str(check["eval_time"]))):
                named = check.get("alertname") or re.search(r'alertname="(\w+)"', check["expr"])
                if named is None:
                    continue  # a recorded series
                name = named if isinstance(named, str) else named[1]
                fires = bool(check.get("exp_alerts") or check.get("exp_samples"))
                states = seen.setdefault(name, set())
                if fires:
                    states |= {"fires", "quiet"} if quiet_before else {"fires"}
                else:
                    states |= {"resolves"} if "fires" in states else {"quiet"}
                    quiet_before = True
    assert {name: seen.pop(name) for name in ALWAYS} == {name: {"fires"} for name in ALWAYS}
    missing = {
        name: sorted({"quiet", "fires", "resolves"} - seen.get(name, set())) for name in ALERTS if name not in ALWAYS
    }
    assert {name: states for name, states in missing.items() if states} == {}


def seconds(duration: str) -> float:
    """A Prometheus duration like 1h30m in seconds."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(float(value) * unit[name] for value, name in re.findall(r"([\d.]+)([smhd])", duration))


def test_recorded_series_are_named_level_metric_operation() -> None:
    for rule in rules("record"):
        assert re.fullmatch(r"[a-z]+:[a-z_0-9]+:[a-z_0-9]+", rule["record"]), rule["record"]


@needs_promtool
def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(ROOT / "prometheus/prometheus.yml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_an_unknown_function_in_a_rule_is_noticed(tmp_path: Path) -> None:
    """The check is able to fail."""
    broken = tmp_path / "broken.yml"
    broken.write_text("groups: [{name: g, rules: [{alert: A, expr: 'rat(up[5m]) > 0'}]}]")
    done = subprocess.run(["promtool", "check", "rules", str(broken)], capture_output=True, text=True)
    assert done.returncode != 0


class TestRender:
    """prometheus/render: the same configuration for other addresses."""

    def render(self, out: Path, *addresses: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "prometheus/render"), "--out", str(out), *addresses]
        return subprocess.run(command, capture_output=True, text=True)

    def test_named_jobs_get_their_address_and_the_others_are_left_out(self, tmp_path: Path) -> None:
        done = self.render(tmp_path, "gateway=127.0.0.1:18080", "prometheus=127.0.0.1:19090")
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
        jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
        assert jobs == {"gateway": ["127.0.0.1:18080"], "prometheus": ["127.0.0.1:19090"]}
        assert "alerting" not in config
        assert sorted(path.name for path in (tmp_path / "rules").iterdir()) == [path.name for path in RULES]

    def test_alertmanager_is_scraped_and_told(self, tmp_path: Path) -> None:
        assert self.render(tmp_path, "alertmanager=127.0.0.1:19093").returncode == 0
        config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
        assert json.dumps(config["alerting"]).count("127.0.0.1:19093") == 1

    def test_an_unknown_job_is_an_error_that_names_the_known_ones(self, tmp_path: Path) -> None:
        done = self.render(tmp_path, "gatway=127.0.0.1:1")
        assert done.returncode != 0
        assert "gatway" in done.stderr
        assert "gateway" in done.stderr
        assert not (tmp_path / "prometheus.yml").exists()
