"""Grafana would have data: its container finds its files and its sources, and each query of each panel has an answer.

Grafana's own image cannot be had without a registry. A stand-in runs in its place, as Compose would run it: same user,
mounts, networks, read-only root. That Grafana itself starts from these files is not shown here.
"""

import contextlib
import json
import re
import urllib.parse
from pathlib import Path

import pytest
import yaml
from grafana import queries
from tests.doubles.monitoring import families
from tests.stack.alarms import page
from tests.stack.appliance import FILES, REPOSITORY, Appliance
from tests.stack.edge import Edge
from tests.stack.load import Load
from tests.stack.waiting import until

pytestmark = pytest.mark.timeout(3600)

# Families that this stack cannot have, with the reason.
SHIPPER = "of the program that ships logs, whose image cannot be had here"
WITHOUT = {
    "loki_write_.*|promtail_.*|edge_requests_total|edge_request_seconds.*|edge_.*_bytes.*|edge:.*": SHIPPER,
    "otelcol_.*": "of Jaeger, whose image cannot be had here",
    "gpu_(?!exporter_|expected$|visible$).*": "there is no GPU here",
    "gateway_energy_joules_total": "there is no GPU here",
}
# Queries and panels whose families are there and which may be empty, with the reason.
QUIET = {
    "Every board: annotation Deploys": "only within two minutes of one",
    "Every board: annotation Engine restarts": "empty while all is well",
    "Every board: annotation Restarts": "empty while all is well",
    "Every board: annotation Pages": "empty while all is well",
    "Gateway: Tried again": "empty while all is well",
    "GPUs: A sample": "no sample was ever taken where there is no GPU",
    "time() - (gpu_exporter_last_hang_timestamp_seconds > 0)": "only after a driver call hung",
}

LOOK = """
import json, os, sys, urllib.request
from pathlib import Path
found = {"files": sorted(str(path) for path in Path("/etc/grafana/provisioning").rglob("*.yml"))}
boards = [json.loads(path.read_text()) for path in Path(sys.argv[1]).glob("*.json")]
found["boards"] = {board["uid"]: len(board["panels"]) for board in boards}
found["home"] = Path(os.environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).is_file()
found["password"] = len(Path(os.environ["GF_SECURITY_ADMIN_PASSWORD__FILE"]).read_text())
Path("/var/lib/grafana/probe").write_text("")
Path("/var/lib/grafana/probe").unlink()
found["answers"] = {url: urllib.request.urlopen(url, timeout=10).status for url in sys.argv[2:]}
print(json.dumps(found))
"""


def reason(family: str) -> str | None:
    """Why this stack has no such family; None when it must have it."""
    return next((why for pattern, why in WITHOUT.items() if re.fullmatch(pattern, family)), None)


def ask(appliance: Appliance, query: str) -> list[object]:
    """The result of an instant query to the appliance's own Prometheus; empty while it does not answer, too."""
    port = int(appliance.settings["PROMETHEUS_PORT"])
    answer = page(port, "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
    return list(json.loads(answer)["data"]["result"]) if answer else []


def test_grafanas_container_finds_its_files_and_its_sources(appliance: Appliance, tmp_path: Path) -> None:
    described = json.loads(appliance.compose("config", "--format", "json"))["services"]
    provisioning = REPOSITORY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources/appliance.yml").read_text())["datasources"]
    provider = yaml.safe_load((provisioning / "dashboards/appliance.yml").read_text())["providers"][0]
    # What Compose gives Grafana, with a program in it that can be had here.
    image = appliance.docker("inspect", "--format", "{{.Config.Image}}", appliance.container("gateway")).strip()
    override = tmp_path / "standin.json"
    override.write_text(json.dumps({"services": {"grafana": {"image": image, "entrypoint": ["python3", "-c", LOOK]}}}))
    running = [one["url"] for one in sources if described[one["name"].lower()]["image"] not in appliance.left_out]
    assert any("prometheus" in url for url in running)
    paths = {"prometheus": "/api/v1/query?query=up", "alertmanager": "/api/v2/status"}
    urls = [url + paths[url.split("/")[2].partition(":")[0]] for url in running]
    appliance.files = (*FILES, str(override))
    try:
        told = appliance.compose("run", "--rm", "--no-deps", "-T", "grafana", provider["options"]["path"], *urls)
    finally:
        appliance.files = FILES
    found = json.loads(told.splitlines()[-1])
    assert found["files"] == [
        "/etc/grafana/provisioning/dashboards/appliance.yml",
        "/etc/grafana/provisioning/datasources/appliance.yml",
    ]
    assert {"overview", "gateway", "engine", "gpus", "keys", "slos", "logs"} <= found["boards"].keys()
    assert found["home"]
    assert found["password"] >= 12
    assert found["answers"] == dict.fromkeys(urls, 200)


def test_every_query_of_every_panel_has_data_after_a_few_calls(appliance: Appliance) -> None:
    asked = [one for one in queries.asked("2m") if one.source == "prometheus"]
    blank = {
        f"{one.name}: {one.expr}": one.expr
        for one in asked
        if not {one.name, one.expr} & QUIET.keys() and not any(reason(family) for family in families(one.expr))
    }

    def all_answered() -> bool:
        Edge(appliance.edge.host, appliance.edge.port, "sk-of-nobody-0123456789").chat()  # refusals have a panel, too
        for shown, query in list(blank.items()):
            if ask(appliance, query):
                del blank[shown]
        return not blank

    with Load(appliance.edge, callers=2), contextlib.suppress(AssertionError):  # what stays blank is said below
        until("every query has an answer", all_answered, 300, every=1)
    assert len(asked) > 150
    assert sorted(blank) == []


def test_what_is_excused_is_really_absent(appliance: Appliance) -> None:
    port = int(appliance.settings["PROMETHEUS_PORT"])
    known = json.loads(until("Prometheus tells its names", lambda: page(port, "/api/v1/label/__name__/values"), 60))[
        "data"
    ]
    assert "gateway_requests_total" in known
    assert sorted(family for family in known if reason(family)) == []
