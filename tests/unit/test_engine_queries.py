"""No rule and no panel asks vLLM or its supervisor for a family that they do not export."""

import re
from pathlib import Path

import yaml
from grafana import queries
from tests.doubles.monitoring import families

from engine.metrics import Metrics

ROOT = Path(__file__).parents[2]
# Names on the /metrics page of the real vLLM 0.32.0 (CPU build) after six calls; tests/engine asks the real one.
RECORDED = set((Path(__file__).parent / "recorded/vllm-0.32.0-families.txt").read_text().split())


def asked() -> set[str]:
    """Every family that a panel, rule or alert names."""
    found = {family for one in queries.asked() if one.source == "prometheus" for family in families(one.expr)}
    for path in (ROOT / "prometheus/rules").glob("*.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                found |= families(rule["expr"])
    return found


# Exported on vLLM's own page by the supervisor's middleware (engine/progress.py); test_engine_progress reads it.
OF_THE_MIDDLEWARE = {"engine_own_tokens_total"}


def declared() -> set[str]:
    """Every name that the supervisor's registry can export."""
    forms = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    return {family.name + form for family in Metrics().registry.collect() for form in forms.get(family.type, ("",))}


def test_of_vllm() -> None:
    names = {family for family in asked() if family.startswith("vllm:")}
    assert len(names) > 20
    assert names - RECORDED == set()


def test_of_the_supervisor() -> None:
    names = {family for family in asked() if family.startswith("engine_")}
    assert len(names) > 5
    assert names - declared() == OF_THE_MIDDLEWARE


def test_no_family_of_the_supervisor_is_without_a_panel() -> None:
    own = {re.sub(r"_(bucket|count|sum)$", "", name) for name in declared() if name.startswith("engine_")}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked()}
    assert own - shown == set()
