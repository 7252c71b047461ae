"""Dashboards: in step with their source, whole, readable, and made of queries that parse."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana import build, queries
from grafana.panels import SOURCES

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "grafana/dashboards").glob("*.json"))
BOARDS = {path.stem: json.loads(path.read_text()) for path in FILES}
PROVISIONED = (ROOT / "grafana/provisioning/datasources/appliance.yml").read_text()
UIDS = {source["uid"] for source in yaml.safe_load(PROVISIONED)["datasources"]}
WANTED = {"overview", "gateway", "engine", "gpus", "keys", "logs", "slos"}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a board that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_files_are_what_their_source_says() -> None:
    assert {path: path.read_text() for path in FILES} == build.files(), "run `python -m grafana.build`"


def test_every_dashboard_that_operators_expect_is_there() -> None:
    assert BOARDS.keys() >= WANTED


@pytest.mark.parametrize("name", BOARDS)
def test_board(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == name
    assert board["description"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    for panel in panels(board):
        if panel["type"] == "text":
            continue
        assert panel["title"]
        assert len(panel["description"]) > 5, f"{panel['title']} does not say what it tells"
        assert panel["type"] == "alertlist" or panel["targets"], f"{panel['title']} asks nothing"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        for target in panel["targets"]:
            assert target["datasource"]["uid"] in UIDS
            assert target["datasource"]["uid"] == SOURCES[target["datasource"]["type"]]
            if panel["type"] not in ("stat", "table", "logs", "gauge"):
                assert target["legendFormat"], f"{panel['title']}: a line without a name"


def test_titles_are_found_once_on_a_board() -> None:
    for name, board in BOARDS.items():
        titles = [panel["title"] for panel in panels(board)]
        doubled = {title for title in titles if titles.count(title) > 1}
        assert doubled <= {"Budget left", "Burn rate"}, f"{name}: {doubled}"


def test_links_lead_to_boards_that_exist() -> None:
    texts = [path.read_text() for path in FILES]
    texts += [path.read_text() for path in (ROOT / "docs/runbooks").glob("*.md")]
    for target in set(re.findall(r"[(\"]/d/([a-z-]+)", "\n".join(texts))):
        assert target in BOARDS


def test_runbooks_name_panels_that_exist() -> None:
    titles = {panel["title"] for board in BOARDS.values() for panel in panels(board)}
    for path in sorted((ROOT / "docs/runbooks").glob("*.md")):
        for name in re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", path.read_text()):
            if name not in {"Space", "Logs", "Targets", "TSDB status", "Rules"}:
                assert name in titles, f"{path.name} speaks of a panel “{name}”"


def test_exemplars_lead_to_traces_and_lines_to_traces_and_calls() -> None:
    sources = {source["uid"]: source for source in yaml.safe_load(PROVISIONED)["datasources"]}
    exemplars = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert exemplars == [{"name": "trace_id", "datasourceUid": "jaeger", "urlDisplayLabel": "Trace"}]
    fields = {field["name"]: field for field in sources["loki"]["jsonData"]["derivedFields"]}
    line = '{"time":"t","event":"call_closed","request_id":"req-1.a_b","trace_id":"0af7651916cd43dd8448eb211c80319c"}'
    assert fields["Trace"]["datasourceUid"] == "jaeger"
    assert re.search(fields["Trace"]["matcherRegex"], line)[1] == "0af7651916cd43dd8448eb211c80319c"
    assert re.search(fields["Call"]["matcherRegex"], line)[1] == "req-1.a_b"
    assert sources["jaeger"]["jsonData"]["tracesToLogsV2"]["datasourceUid"] == "loki"
    # Grafana expands $NAME in provisioning files: a literal dollar is written twice.
    assert not re.search(r"(?<!\$)\$(?!\$)", re.sub(r"#.*", "", PROVISIONED))
    uids = {panel["type"] for board in BOARDS.values() for panel in panels(board)}
    assert {"timeseries", "heatmap", "logs", "stat", "state-timeline"} <= uids
    assert any(target.get("exemplar") for panel in panels(BOARDS["gateway"]) for target in panel["targets"])


def test_a_board_knows_restarts_and_deploys() -> None:
    for name in WANTED:
        assert {note["name"] for note in BOARDS[name]["annotations"]["list"]} >= {"Restarts", "Deploys", "Pages"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH (apt-get install prometheus)")
def test_every_query_to_prometheus_parses(tmp_path: Path) -> None:
    found = [asked for asked in queries.asked() if asked.source == "prometheus"]
    assert len(found) > 150
    rules = [{"record": f"a:b{number}:c", "expr": asked.expr} for number, asked in enumerate(found)]
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_to_loki_are_balanced_and_select_by_label() -> None:
    """No Loki runs here: what can be seen from the text is checked."""
    found = [asked for asked in queries.asked() if asked.source == "loki"]
    assert len(found) > 8
    for asked in found:
        assert re.search(r'\{service[=~!]+"', asked.expr), asked.name
        for opening, closing in ("()", "[]", "{}"):
            assert asked.expr.count(opening) == asked.expr.count(closing), asked.name
        assert asked.expr.count("`") % 2 == 0
        assert asked.expr.count('"') % 2 == 0
        assert "$" not in asked.expr
