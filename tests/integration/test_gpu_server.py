"""The exporter as a program: configuration, answers, latency, memory, energy, demo."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.doubles.nvml.running import QUICK, Exporter, Page
from tests.doubles.nvml.scenario import Scenario, build

P99_SECONDS = 0.005
SAMPLE_SECONDS = 1.0
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def refused(**environment: str) -> list[str]:
    """What the program says on its way out when the configuration is bad."""
    program = str(Path(sys.executable).with_name("gpu-exporter"))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GPU_")}
    ended = subprocess.run(
        [program], env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def test_bad_configuration_is_told_whole_and_ends_it_with_2() -> None:
    said = refused(GPU_SAMPLE_SECOND="1", GPU_EXPORTER_PORT="99999", METRIC_NAMES="both?", DEMO="2xVoodoo")

    assert said[0] == "gpu-exporter: GPU_SAMPLE_SECOND: no such variable; did you mean GPU_SAMPLE_SECONDS?"
    assert len(said) == 4
    assert any("GPU_EXPORTER_PORT" in line for line in said)
    assert any("METRIC_NAMES" in line and "'native', 'dcgm' or 'both'" in line for line in said)
    assert any("DEMO" in line and "H100" in line for line in said)


def test_a_taken_port_ends_it_with_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        program = str(Path(sys.executable).with_name("gpu-exporter"))
        environment = {**os.environ, "GPU_EXPORTER_PORT": str(taken.getsockname()[1])}
        ended = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert '"event": "cannot_listen"' in ended.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_0_when_told_to(number: int, library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with Exporter(scenario.environment(library)) as exporter:
        exporter.until("a sample", lambda page: page.state() == "ok")
        assert exporter.stop(number) == 0


def test_it_ends_in_time_while_the_driver_hangs(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__PowerUsage="hang")
    with Exporter({**scenario.environment(library), "GPU_DEADLINE_SECONDS": "600"}) as exporter:
        started = time.monotonic()
        assert exporter.stop() == 0
        assert time.monotonic() - started < 9  # Compose kills after ten; who waited for the driver would take 600


def test_other_paths_and_methods(library: Path, tmp_path: Path) -> None:
    with Exporter(Scenario(tmp_path, "l4").environment(library)) as exporter:
        assert exporter.get("/")[0] == 404
        assert exporter.get("/metrics?name[]=gpu_up")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=60)
        for method, status in (("HEAD", 200), ("GET", 200), ("POST", 501)):
            connection.request(method, "/metrics")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status
            assert (body == b"") == (method == "HEAD")
        connection.close()


@pytest.mark.parametrize("sent", [b'PO"ST /metrics HTTP/1.1\r\n\r\n', b"GET / HTTP/9.9\r\n\r\n", b"nonsense\r\n\r\n"])
def test_what_cannot_be_served_is_told_as_json_without_what_was_sent(
    sent: bytes, library: Path, tmp_path: Path
) -> None:
    with Exporter(Scenario(tmp_path, "l4").environment(library)) as exporter:
        with socket.create_connection(("127.0.0.1", exporter.port), timeout=60) as connection:
            connection.sendall(sent)
            head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
        assert head.split()[1] in (b"400", b"501", b"505")
        assert b"application/json" in head
        assert b"Server:" not in head
        assert list(json.loads(body)) == ["error"]
        assert b"ST" not in body
        assert b"nonsense" not in body


def test_a_crowd_of_idle_connections_is_bounded_and_leaves_again(library: Path, tmp_path: Path) -> None:
    with Exporter(Scenario(tmp_path, "l4").environment(library)) as exporter:
        process = psutil.Process(exporter.process.pid)
        before = process.num_threads()
        crowd = [socket.create_connection(("127.0.0.1", exporter.port)) for _ in range(80)]
        exporter.event("connection_refused")
        assert process.num_threads() <= before + 32
        for connection in crowd:
            connection.close()
        assert _reaches(exporter)


def _reaches(exporter: Exporter) -> bool:
    """Whether a scrape gets through before long; refused connections break off."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return exporter.get("/metrics")[0] == 200
        except (OSError, http.client.HTTPException):
            time.sleep(0.02)
    return False


def p99(port: int, scrapes: int = 300) -> float:
    """Seconds within which 99 of 100 scrapes on one connection are answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    taken = []
    for _ in range(scrapes):
        started = time.perf_counter()
        connection.request("GET", "/metrics")
        connection.getresponse().read()
        taken.append(time.perf_counter() - started)
    connection.close()
    return sorted(taken)[int(scrapes * 0.99)]


def scrapes_are_quick(exporter: Exporter) -> None:
    """99 of 100 scrapes take under 5 ms; on a machine that is too busy for that, so much of the processor's time at most,
    and nowhere near what waiting for the driver would take. Of several rounds the quietest counts: noise only adds."""
    process = psutil.Process(exporter.process.pid)
    wall = work = float("inf")
    for _ in range(8):
        before = process.cpu_times()
        wall = min(wall, p99(exporter.port))
        after = process.cpu_times()
        work = min(work, (after.user + after.system - before.user - before.system) / 300)
        if wall < P99_SECONDS:
            return
    assert work < P99_SECONDS, f"{work * 1e3:.1f} ms of work for a scrape"
    assert wall < SAMPLE_SECONDS, f"p99 {wall * 1e3:.1f} ms"


def test_a_scrape_of_eight_gpus_is_quick(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, *["h100"] * 8)
    with Exporter({**scenario.environment(library), "GPU_SAMPLE_SECONDS": str(SAMPLE_SECONDS)}) as exporter:
        exporter.until("eight GPUs", lambda page: page.value("gpu_visible") == 8)
        scrapes_are_quick(exporter)


def test_a_scrape_is_quick_also_while_the_driver_hangs(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, *["h100"] * 8)
    hang = {"GPU_SAMPLE_SECONDS": str(SAMPLE_SECONDS), "GPU_DEADLINE_SECONDS": "120"}
    with Exporter({**scenario.environment(library), **hang}) as exporter:
        exporter.until("eight GPUs", lambda page: page.value("gpu_visible") == 8)
        scenario.change(_5__UtilizationRates="hang")
        scrapes_are_quick(exporter)
        assert exporter.get("/health")[0] == 200


def grown(exporter: Exporter, scrapes: int) -> int:
    """Bytes of memory gained over so many scrapes, half of them on connections of their own."""
    process = psutil.Process(exporter.process.pid)
    processes = [process, *process.children()]
    kept = http.client.HTTPConnection("127.0.0.1", exporter.port, timeout=60)

    def scrape(times: int) -> None:
        for number in range(times):
            if number % 2:
                exporter.get("/metrics")
            else:
                kept.request("GET", "/metrics")
                kept.getresponse().read()

    scrape(500)  # what is taken once: buffers, caches, the allocator's arenas
    before = sum(p.memory_info().rss for p in processes)
    scrape(scrapes)
    after = sum(p.memory_info().rss for p in processes)
    kept.close()
    return after - before


def test_memory_is_flat_over_scrapes(library: Path, tmp_path: Path) -> None:
    with Exporter(Scenario(tmp_path, "h100", "h100").environment(library)) as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        # An arena that the allocator takes late comes once; a leak comes every time.
        assert any(grown(exporter, 1500) < 2 * MIB for _ in range(3))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_a_hundred_thousand_scrapes(library: Path, tmp_path: Path) -> None:
    with Exporter(Scenario(tmp_path, "h100", "h100").environment(library)) as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        gained = grown(exporter, 100_000)
        print(f"memory gained over 100,000 scrapes: {gained / MIB:.2f} MiB")
        assert gained < 2 * MIB


def test_energy_is_the_drivers_sum(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "a100")
    scenario.change(_0__TotalEnergyConsumption="1000500", _1__TotalEnergyConsumption="2000250")
    with Exporter(scenario.environment(library)) as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        energy = exporter.json("/energy")
        assert energy["joules_total"] == pytest.approx(3000.75)
        assert energy["gpus"] == {scenario.uuid(0): pytest.approx(1000.5), scenario.uuid(1): pytest.approx(2000.25)}
        assert abs(time.time() - energy["timestamp"]) < 30


def test_the_demo_says_that_it_is_one() -> None:
    with Exporter({"DEMO": "2xH100", "METRIC_NAMES": "both"}) as exporter:
        page = exporter.next_sample()

        assert page.value("gpu_visible") == 2
        assert page.value("gpu_exporter_info", source="demo") == 1
        names = [s.labels["name"] for s in page.samples if s.name == "gpu_info"]
        assert names == ["NVIDIA H100 80GB HBM3 (demo)"] * 2
        assert exporter.json("/health")["demo"] is True
        assert exporter.event("demo")["level"] == "warning"
        later = exporter.next_sample()
        assert _energy(later) > _energy(page)


def _energy(page: Page) -> float:
    return sum(page.values("gpu_energy_joules_total"))


def test_the_shared_environment_is_accepted() -> None:
    """The engine's GPU_MEMORY_UTILIZATION may stand in the environment of every service."""
    with Exporter({"GPU_MEMORY_UTILIZATION": "0.9", "DEMO": "1xL4", **QUICK}) as exporter:
        assert exporter.get("/health")[0] == 200
