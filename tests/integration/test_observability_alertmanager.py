"""Alertmanager for real: what `start` writes is accepted, and alerts arrive grouped, inhibited and resolved."""

import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.doubles.ports import free_port
from tests.doubles.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
START = ROOT / "alertmanager/start"
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
needs_amtool = pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool is not on PATH (Debian: apt-get install prometheus-alertmanager)"
)
needs_alertmanager = pytest.mark.skipif(
    ALERTMANAGER is None, reason="Alertmanager is not on PATH (Debian: apt-get install prometheus-alertmanager)"
)


def start(config: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `alertmanager/start` with a program in Alertmanager's place that does nothing."""
    environment = {"PATH": os.environ["PATH"], "ALERTMANAGER": "true", "ALERTMANAGER_CONFIG": str(config), **variables}
    return subprocess.run([str(START)], env=environment, capture_output=True, text=True)


EMAIL = {
    "ALERT_EMAIL_TO": "ops@example.org",
    "ALERT_EMAIL_FROM": "llm@example.org",
    "ALERT_SMTP_HOST": "mail.example.org:587",
}


@needs_amtool
@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ALERT_WEBHOOK_URL": "http://127.0.0.1:9/it's?a=1&b=2"},
        {"ALERT_HEARTBEAT_URL": "http://127.0.0.1:9/beat'?a=1"},
        {"ALERT_SLACK_URL": "https://slack.example/T/B/x", "ALERT_SLACK_CHANNEL": "#llm"},
        EMAIL,
        {**EMAIL, "ALERT_SMTP_USER": "u", "ALERT_SMTP_PASSWORD": "p: 'q' # \\ \"", "ALERT_SMTP_TLS": "false"},
    ],
    ids=["nobody", "webhook", "heartbeat", "slack", "email", "email with password"],
)
def test_what_is_written_is_accepted_by_alertmanager(tmp_path: Path, variables: dict[str, str]) -> None:
    config = tmp_path / "alertmanager.yml"
    assert start(config, **variables).returncode == 0
    done = subprocess.run(["amtool", "check-config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert config.stat().st_mode & 0o077 == 0, "the receivers' secrets are for Alertmanager alone"
    for value in variables.values():
        if value not in ("true", "false"):
            assert value.replace("'", "''") in config.read_text()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"ALERT_EMAIL_TO": "ops@example.org"}, "ALERT_SMTP_HOST"),
        ({"ALERT_EMAIL_TO": "ops@example.org", "ALERT_SMTP_HOST": "m:25"}, "ALERT_EMAIL_FROM"),
        ({**EMAIL, "ALERT_SMTP_TLS": "maybe"}, "ALERT_SMTP_TLS"),
        ({"ALERT_SLACK_CHANNEL": "#llm"}, "ALERT_SLACK_URL"),
        ({"ALERT_WEBHOOK_URL": "http://a\nroute: {}"}, "ALERT_WEBHOOK_URL"),
        ({"ALERT_SLACK_URL_FILE": "/does/not/exist"}, "ALERT_SLACK_URL_FILE"),
        ({"ALERT_WEBHOOK_URL": "http://a", "ALERT_WEBHOOK_URL_FILE": "/etc/hostname"}, "ALERT_WEBHOOK_URL_FILE"),
    ],
)
def test_contradictions_stop_the_start_with_the_variables_name(
    tmp_path: Path, variables: dict[str, str], named: str
) -> None:
    done = start(tmp_path / "alertmanager.yml", **variables)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("http://127.0.0.1:9/from-a-file\n")
    assert start(tmp_path / "a.yml", ALERT_WEBHOOK_URL_FILE=str(secret)).returncode == 0
    assert "url: 'http://127.0.0.1:9/from-a-file'" in (tmp_path / "a.yml").read_text()


class Receiver:
    """A webhook that keeps what it was told."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.messages.append(json.loads(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/"

    def told(self, name: str, status: str) -> bool:
        """Whether an alert of this name was delivered with this status."""
        return any(
            alert["labels"]["alertname"] == name and alert["status"] == status
            for message in self.messages
            for alert in message["alerts"]
        )

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


@pytest.fixture
def alertmanager(tmp_path: Path, receiver: Receiver) -> Iterator[str]:
    """The base URL of a real Alertmanager, started as in the image, with short waiting times."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "alertmanager", home)
    routes = (home / "routes.yml").read_text()
    for long in ("group_wait: 30s", "group_wait: 10s"):
        assert long in routes
        routes = routes.replace(long, "group_wait: 1s")
    for long in ("group_interval: 5m", "group_interval: 1m"):
        assert long in routes
        routes = routes.replace(long, "group_interval: 1s")
    assert "repeat_interval: 1m" in routes
    routes = routes.replace("repeat_interval: 1m", "repeat_interval: 1s")
    (home / "routes.yml").write_text(routes)
    address = f"127.0.0.1:{free_port()}"
    assert ALERTMANAGER is not None
    process = subprocess.Popen(
        [
            *(str(home / "start"), f"--storage.path={tmp_path}/data", f"--web.listen-address={address}"),
            "--cluster.listen-address=",
        ],
        env={
            "PATH": os.environ["PATH"],
            "ALERTMANAGER": ALERTMANAGER,
            "ALERTMANAGER_CONFIG": str(tmp_path / "a.yml"),
            "ALERT_WEBHOOK_URL": receiver.url,
            "ALERT_HEARTBEAT_URL": receiver.url,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ready() -> bool:
        assert process.poll() is None, "Alertmanager ended"
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=20) as answer:
                return answer.status == 200
        except urllib.error.HTTPError as answer:
            answer.close()
            return False
        except OSError:
            return False

    wait_until("Alertmanager to be ready", ready)
    yield f"http://{address}"
    process.terminate()
    process.wait(PATIENCE)


def post(base: str, *alerts: dict[str, str], ended: bool = False) -> None:
    """Tell Alertmanager of alerts, as Prometheus does."""
    now = datetime.now(UTC)
    end = now - timedelta(seconds=1) if ended else now + timedelta(minutes=5)
    body = [
        {
            "labels": alert,
            "annotations": {"summary": "s"},
            "startsAt": (now - timedelta(minutes=1)).isoformat(),
            "endsAt": end.isoformat(),
        }
        for alert in alerts
    ]
    request = urllib.request.Request(
        f"{base}/api/v2/alerts", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


HUNG = {"alertname": "EngineHung", "severity": "page", "component": "engine"}
SLOW = {"alertname": "QueueLong", "severity": "ticket", "component": "gateway", "symptom_of": "engine"}
DISK = {"alertname": "DiskNearlyFull", "severity": "ticket", "component": "gateway"}


@needs_alertmanager
def test_the_cause_is_told_its_symptoms_are_not_and_the_end_is_told(alertmanager: str, receiver: Receiver) -> None:
    post(alertmanager, HUNG, SLOW, DISK)
    wait_until("the cause", lambda: receiver.told("EngineHung", "firing"))
    wait_until("an alert that has nothing to do with it", lambda: receiver.told("DiskNearlyFull", "firing"))
    assert not receiver.told("QueueLong", "firing")
    post(alertmanager, HUNG, ended=True)
    wait_until("the end of the cause", lambda: receiver.told("EngineHung", "resolved"))
    wait_until("the symptom, now that its cause is gone", lambda: receiver.told("QueueLong", "firing"))


@needs_alertmanager
def test_alerts_of_one_kind_come_in_one_message(alertmanager: str, receiver: Receiver) -> None:
    down = [
        {"alertname": "TargetDown", "severity": "page", "component": "loki", "instance": str(number)}
        for number in range(20)
    ]
    post(alertmanager, *down)

    def told() -> set[str]:
        return {alert["labels"]["instance"] for message in receiver.messages for alert in message["alerts"]}

    wait_until("all alerts are told", lambda: len(told()) == 20)
    # One as a rule; on a slow machine the group is sent again while its last alerts are still being taken in.
    assert len(receiver.messages) < len(down) / 2


@needs_alertmanager
def test_the_heartbeat_goes_on_and_only_to_its_own_address(alertmanager: str, receiver: Receiver) -> None:
    post(alertmanager, {"alertname": "Watchdog", "severity": "heartbeat", "component": "prometheus"}, DISK)
    wait_until(
        "it is heard again and again", lambda: [m["receiver"] for m in receiver.messages].count("heartbeat") >= 3
    )
    wait_until("an alert for people", lambda: receiver.told("DiskNearlyFull", "firing"))
    for message in receiver.messages:
        names = {alert["labels"]["alertname"] for alert in message["alerts"]}
        assert names == ({"Watchdog"} if message["receiver"] == "heartbeat" else {"DiskNearlyFull"})
