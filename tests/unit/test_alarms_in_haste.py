"""The rules that the stack tests listen to are the product's, with a shorter patience and nothing else changed."""

from pathlib import Path

import pytest
import yaml
from tests.stack.alarms import hasty, without_patience, written

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "prometheus/rules").glob("*.yml")), ids=lambda path: path.stem)
def test_only_the_patience_differs(path: Path) -> None:
    rules = yaml.safe_load(path.read_text())
    quick = hasty(rules)
    assert without_patience(quick) == without_patience(rules)
    waiting = [rule["for"] for group in rules["groups"] for rule in group["rules"] if "for" in rule]
    shortened = [rule["for"] for group in quick["groups"] for rule in group["rules"] if "for" in rule]
    assert len(shortened) == len(waiting)
    minutes = {"1m": "333ms", "2m": "667ms", "3m": "1000ms", "5m": "1667ms", "10m": "3333ms", "15m": "5000ms"}
    assert shortened == [{**minutes, "30m": "10000ms", "1h": "20000ms"}[one] for one in waiting]


def test_the_written_copy_asks_who_is_in_the_stack(tmp_path: Path) -> None:
    folder = written(tmp_path / "prometheus")
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    asked = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    product = yaml.safe_load((ROOT / "prometheus/prometheus.yml").read_text())
    for job in product["scrape_configs"]:
        if job["job_name"] in asked:
            assert asked[job["job_name"]] == job["static_configs"][0]["targets"], "the same addresses"
    assert config["alerting"]["alertmanagers"][0]["static_configs"] == [{"targets": ["alertmanager:9093"]}]
    assert sorted(path.name for path in (folder / "rules").iterdir()) == sorted(
        path.name for path in (ROOT / "prometheus/rules").iterdir()
    )
