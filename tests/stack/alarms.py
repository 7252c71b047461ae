"""The product's alerts, heard in seconds: a second Prometheus beside the appliance's own.

It scrapes the same services, has the same rules and tells the same Alertmanager. Two things differ: it looks every second,
and each alert's patience (`for:`) is a 180th, so that three minutes of the product are one second here. Nothing else may
differ, and `written` makes sure.
"""

import copy
import http.client
import json
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import yaml
from tests.stack.appliance import REPOSITORY, Appliance, free_ports
from tests.stack.waiting import until

HASTE = 180
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
# Who is asked in the stack, job by job; Prometheus itself is not: it is the one that would tell.
JOBS = {
    "nginx": "nginx:8081", "gateway": "gateway:8080", "vllm": "vllm:8000", "engine": "vllm:8001",
    "gpu": "gpu-exporter:9101", "alertmanager": "alertmanager:9093",
}  # fmt: skip
Rules = dict[str, Any]


def hasty(rules: Rules) -> Rules:
    """A copy of a rule file with every alert's patience divided by `HASTE`, in whole milliseconds."""
    found = copy.deepcopy(rules)
    for rule in (rule for group in found["groups"] for rule in group["rules"]):
        if "for" in rule:
            rule["for"] = f"{max(1, round(_seconds(rule['for']) * 1000 / HASTE))}ms"
    return found


def without_patience(rules: Rules) -> Rules:
    """A copy of a rule file without any `for:`, to see that nothing else differs."""
    found = copy.deepcopy(rules)
    for rule in (rule for group in found["groups"] for rule in group["rules"]):
        rule.pop("for", None)
    return found


def _seconds(text: str) -> float:
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * SECONDS[unit]


def written(folder: Path) -> Path:
    """The product's configuration and rules in `folder`, hasty."""
    render = [sys.executable, str(REPOSITORY / "prometheus/render"), "--out", str(folder), "--interval", "1s"]
    subprocess.run([*render, *(f"{job}={address}" for job, address in JOBS.items())], check=True)
    for path in sorted((folder / "rules").glob("*.yml")):
        rules = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(hasty(rules), sort_keys=False))
        assert without_patience(yaml.safe_load(path.read_text())) == without_patience(rules)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


class Alarms:
    """The second Prometheus. It comes back by itself after a power cut, as the appliance does."""

    def __init__(self, appliance: Appliance, folder: Path) -> None:
        self.appliance = appliance
        self.name = f"{appliance.project}-alarms"
        (self.port,) = free_ports(1)
        image = json.loads(appliance.compose("config", "--format", "json"))["services"]["prometheus"]["image"]
        appliance.docker(
            "run", "--detach", "--name", self.name, "--network", f"{appliance.project}_monitoring",
            "--restart", "unless-stopped", "--publish", f"127.0.0.1:{self.port}:9090",
            "--volume", f"{written(folder)}:/etc/prometheus:ro", image, "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus",
        )  # fmt: skip

    def listen(self) -> None:
        """Joins the engine's network; returns once it sees every service."""
        self.appliance.docker("network", "connect", f"{self.appliance.project}_engine", self.name)
        until("the second Prometheus sees every service", lambda: self._up() >= JOBS.keys(), 180)

    def remove(self) -> None:
        """Takes it away."""
        self.appliance.docker("rm", "--force", "--volumes", self.name)

    def fired(self, alert: str, since: float) -> bool:
        """Whether `alert` (`Name` or `Name/component`) was firing at any moment after `since` (Unix seconds)."""
        name, _, component = alert.partition("/")
        where = f'alertname="{name}",alertstate="firing"' + (f',component="{component}"' if component else "")
        window = max(1, int(time.time() - since))
        return bool(self.ask(f"count_over_time(ALERTS{{{where}}}[{window}s])"))

    def told(self, alert: str) -> bool:
        """Whether Alertmanager has it now."""
        name, _, component = alert.partition("/")
        answer = page(int(self.appliance.settings["ALERTMANAGER_PORT"]), "/api/v2/alerts")
        found = json.loads(answer) if answer else []
        labels = [one["labels"] for one in found]
        return any(one["alertname"] == name and component in ("", one.get("component")) for one in labels)

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The result of an instant query; empty while it cannot be asked."""
        path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
        answer = page(self.port, path)
        return list(json.loads(answer)["data"]["result"]) if answer else []

    def _up(self) -> set[str]:
        return {one["metric"]["job"] for one in self.ask("up == 1")}


def page(port: int, path: str) -> str:
    """What a port of this machine answers with 200; empty when it does not."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode()
        return text if response.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
