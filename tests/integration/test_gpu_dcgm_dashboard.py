"""NVIDIA's own dashboard for DCGM works on our exporter: each of its queries gives a series for each GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.doubles.nvml.running import Exporter, Page
from tests.doubles.nvml.scenario import Scenario, build

DASHBOARD = json.loads((Path(__file__).parents[1] / "golden/gpu/dcgm-dashboard-12239.json").read_text())
QUERIES = [query for queries in DASHBOARD["revisions"].values() for query in queries]
ONE_SERIES = ("avg(", "sum(", "count by (Hostname)")


def evaluated(page: Page, expectations: dict[str, int], folder: Path) -> subprocess.CompletedProcess[str]:
    """Have promtool count what each query gives on the page's samples."""
    series = [
        {"series": _series(s.name.removesuffix("_total"), {**s.labels, "instance": "box:9101"}), "values": str(s.value)}
        for s in page.samples
    ]
    checks = [
        {"expr": f"count({query})", "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": expected}]}
        for query, expected in expectations.items()
    ]
    test = folder / "dashboard.yml"
    test.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": checks}]}))
    promtool = shutil.which("promtool") or pytest.skip("promtool is not on PATH (Debian: apt-get install prometheus)")
    return subprocess.run([promtool, "test", "rules", str(test)], capture_output=True, text=True, check=False)


def _series(name: str, labels: dict[str, str]) -> str:
    return f"{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in labels.items())}}}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    scenario = Scenario(tmp_path_factory.mktemp("machine"), "h100", "h100")
    library = build(tmp_path_factory.mktemp("nvml"))
    with Exporter({**scenario.environment(library), "METRIC_NAMES": "dcgm", "GPU_HOSTNAME": "box"}) as exporter:
        return exporter.next_sample()


def test_every_query_gives_its_series(page: Page, tmp_path: Path) -> None:
    wanted = {}
    for query in QUERIES:
        chosen = query.replace("$Hostname", "box").replace("$instance", ".+").replace("$gpu", "0|1")
        wanted[chosen] = 1 if query.startswith(ONE_SERIES) else 2
    done = evaluated(page, wanted, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_query_without_a_series_is_noticed(page: Page, tmp_path: Path) -> None:
    assert evaluated(page, {"DCGM_FI_DEV_NO_SUCH_FIELD": 1}, tmp_path).returncode != 0
