"""One service in the foreground, and the services that watch alone: the smaller verbs, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from scripts.local import settings
from scripts.local.places import ROOT, program
from tests.doubles.ports import accepts, free_ports
from tests.doubles.waiting import wait_until


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    ports = dict(zip(settings.PORT_VARIABLES, map(str, free_ports(len(settings.PORT_VARIABLES))), strict=True))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    yield {**kept, **ports, "MODE": "local", "APPLIANCE_STATE": str(tmp_path / "state")}
    assert not [name for name, port in ports.items() if accepts(int(port))]


@pytest.mark.parametrize(("name", "variable"), [("gateway", "GATEWAY_PORT"), ("gpu-exporter", "GPU_EXPORTER_PORT")])
def test_a_service_in_the_foreground_ends_with_its_signal(
    environment: dict[str, str], name: str, variable: str
) -> None:
    argv = [ROOT / "scripts/run-service", name]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL) as process:
        port = int(environment[variable])
        wait_until(f"{name} listens", lambda: accepts(port))
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_an_unknown_service_is_refused(environment: dict[str, str]) -> None:
    argv = [ROOT / "scripts/run-service", "database"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such service: database" in done.stderr


@pytest.mark.skipif(program("prometheus") is None, reason="Prometheus is not installed (apt-get install prometheus)")
def test_monitoring_without_docker_is_prometheus(environment: dict[str, str]) -> None:
    def monitoring(verb: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([ROOT / "scripts/monitoring", verb], env=environment, stdout=subprocess.PIPE, check=True)

    told = monitoring("up").stdout.decode()
    port = int(environment["PROMETHEUS_PORT"])
    try:
        assert f"http://127.0.0.1:{port}" in told
        wait_until("Prometheus listens", lambda: accepts(port))

        def jobs() -> set[str]:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/targets")
            found = answer.json()["data"]["activeTargets"] if answer.status_code == 200 else []
            return {job["labels"]["job"] for job in found}

        assert wait_until("Prometheus has its targets", jobs) >= {"nginx", "gateway", "vllm", "gpu", "prometheus"}
    finally:
        monitoring("down")
    assert not accepts(port)
