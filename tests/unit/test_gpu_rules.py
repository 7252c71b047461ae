"""The alerts ask only for what the exporter tells."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gpu_exporter.collector import Health, render_health
from gpu_exporter.native import FAMILIES, MIG_FAMILIES

ROOT = Path(__file__).parents[2]
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "prometheus/rules/gpu.yml").read_text())["groups"]
    for rule in group["rules"]
]
# What /metrics can hold: the tables and the exporter's health with something in every family.
FULL = Health(gpus={"GPU-1": (0, "lost")}, xids={("GPU-1", 0, "79"): (1, 2.0)}, failures={("nvmlInit", "unknown"): 1})
NAMES = {row.name for row in (*FAMILIES, *MIG_FAMILIES)} | set(
    re.findall(r"^# TYPE (\S+)", render_health(FULL, "native", 0.0), re.MULTILINE)
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_name_in_an_alert_is_a_metric(rule: dict[str, str]) -> None:
    asked = set(re.findall(r"\bgpu_[a-z0-9_]+", re.sub(r"\{.*?\}|on \(.*?\)", "", rule["expr"])))
    assert asked
    assert asked <= NAMES
