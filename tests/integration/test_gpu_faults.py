"""What the exporter says when the driver lies, hangs, crashes or goes away, and that it comes back by itself."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import psutil
import pytest
from tests.doubles.nvml.running import HANGING, collecting, started, waited
from tests.doubles.nvml.scenario import LIBRARY, Scenario, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.mark.parametrize("call", ["Handle", "PowerUsage", "FieldValues", "UUID"])
def test_a_gpu_that_falls_off_the_bus_is_told_and_the_other_stays(call: str, library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    lost = scenario.uuid(1)
    with started(scenario, library) as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        scenario.change(**{f"_1__{call}": "!15"})
        page = exporter.until("the loss", lambda page: page.value("gpu_up", uuid=lost) == 0)

        assert page.value("gpu_unreadable", uuid=lost, gpu="1", reason="lost") == 1
        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (1, 2)
        assert page.values("gpu_power_watts", gpu="1") == []
        assert page.value("gpu_power_watts", gpu="0") == 412.35
        assert page.value("gpu_exporter_last_collect_success") == 1
        assert exporter.event("gpu_unreadable", uuid=lost, reason="lost")["level"] == "error"
        assert exporter.json("/health")["status"] == "degraded"

        scenario.change(**{f"_1__{call}": {"PowerUsage": "100000", "UUID": lost}.get(call)})
        exporter.until("its return", lambda page: page.value("gpu_up", uuid=lost) == 1)
        exporter.event("gpu_back", uuid=lost)


def test_a_gpu_that_leaves_the_list_is_still_expected(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    with started(scenario, library) as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        scenario.change(Count="1", Init="!9")  # the driver is unloaded …
        scenario.change(_0__Handle="!1")
        exporter.until("no driver", lambda page: page.state() == "no_driver")
        scenario.change(Init=None, _0__Handle=None)  # … and comes back with one GPU
        page = exporter.until("one GPU", lambda page: page.value("gpu_visible") == 1)

        assert page.value("gpu_unreadable", uuid=scenario.uuid(1), reason="gone") == 1
        assert page.value("gpu_expected") == 2


def test_fewer_gpus_than_configured_is_seen_from_the_start(library: Path, tmp_path: Path) -> None:
    with started(Scenario(tmp_path, "h100"), library, GPU_EXPECTED="2") as exporter:
        page = exporter.until("a sample", collecting)
        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (1, 2)


def test_a_call_that_hangs_takes_the_data_away_and_then_only_its_own_gpu(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    with started(scenario, library, **HANGING, GPU_SAMPLE_SECONDS="0.2") as exporter:
        exporter.until("two GPUs", lambda page: page.value("gpu_visible") == 2)
        scenario.change(_1__PcieReplayCounter="hang")

        page = exporter.until("the hang", lambda page: page.state() == "hung")
        assert page.values("gpu_power_watts") == []  # nothing stale
        assert page.value("gpu_exporter_last_collect_success") == 0
        assert page.value("gpu_exporter_call_failures_total", call="nvmlDeviceGetPcieReplayCounter", error="hung")
        said = exporter.event("collect_failed", state="hung")
        assert (said["call"], said["gpu"]) == ("nvmlDeviceGetPcieReplayCounter", 1)
        assert "does not return" in said["advice"]

        page = exporter.until("the healthy GPU", lambda page: page.value("gpu_visible") == 1)
        assert page.value("gpu_power_watts", gpu="0") == 412.35
        assert page.value("gpu_unreadable", gpu="1", reason="hung") == 1
        assert (page.value("gpu_exporter_probe_replacements_total") or 0) >= 1
        assert page.value("gpu_exporter_stuck_probes") == 0


def test_a_driver_that_hangs_on_start_is_left_and_tried_again(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(Init="hang")
    with started(scenario, library, GPU_OPEN_SECONDS="5", GPU_RETRY_SECONDS="1") as exporter:
        page = exporter.until("the hang", lambda page: page.state() == "hung")
        assert page.value("gpu_exporter_call_failures_total", call="nvmlInit", error="hung")
        assert exporter.get("/health")[0] == 200
        scenario.change(Init=None)
        exporter.until("recovery", collecting)


def test_a_crash_inside_the_driver_ends_only_the_probe(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library) as exporter:
        exporter.until("a sample", collecting)
        scenario.change(_0__UtilizationRates="crash")
        failed = {"call": "nvmlDeviceGetUtilizationRates", "error": "probe_died_of_signal_11"}
        exporter.until("the crash", lambda page: page.values("gpu_exporter_call_failures_total", **failed))
        scenario.change(_0__UtilizationRates="50 50")
        exporter.until("recovery", collecting)


def test_a_probe_that_is_killed_is_replaced(library: Path, tmp_path: Path) -> None:
    with started(Scenario(tmp_path, "h100"), library) as exporter:
        exporter.until("a sample", collecting)
        (probe,) = psutil.Process(exporter.process.pid).children()
        probe.kill()
        exporter.until("a new probe", lambda page: (page.value("gpu_exporter_probe_replacements_total") or 0) >= 1)
        exporter.until("recovery", collecting)


def test_a_probe_that_ends_between_two_samples_is_told(library: Path, tmp_path: Path) -> None:
    with started(Scenario(tmp_path, "h100"), library, GPU_SAMPLE_SECONDS="3") as exporter:
        exporter.until("a sample", collecting)
        (probe,) = psutil.Process(exporter.process.pid).children()
        probe.kill()
        failed = {"error": "probe_died_of_signal_9"}
        exporter.event("probe_ended", level="warning", **failed)
        page = exporter.until("a new probe", lambda page: page.values("gpu_exporter_call_failures_total", **failed))
        assert page.value("gpu_exporter_failed_collects_total") == 0  # no sample was lost


def ended(process: psutil.Process) -> bool:
    """Whether it is no more; one that nobody has collected counts as ended, one that got its number does not count."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("call", [None, "PowerUsage"])
def test_no_probe_outlives_the_exporter(call: str | None, library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library, GPU_DEADLINE_SECONDS="60") as exporter:
        exporter.until("a sample", collecting)
        (probe,) = psutil.Process(exporter.process.pid).children()
        if call:
            scenario.change(**{f"_0__{call}": "hang"})
        exporter.stop(signal.SIGKILL)
        waited("the probe's end", lambda: True if ended(probe) else None)


def test_access_lost_after_a_host_reload_is_recognised_and_explained(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library) as exporter:
        exporter.until("a sample", collecting)
        scenario.change(_0__Handle="!1", Init="!999")
        page = exporter.until("the loss", lambda page: page.state() == "access_lost")
        assert page.values("gpu_temperature_celsius") == []
        assert "Restart this container" in exporter.event("collect_failed", state="access_lost")["advice"]


def test_access_lost_ends_the_program_where_that_is_wanted(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library, GPU_EXIT_ON_ACCESS_LOST="true") as exporter:
        exporter.until("a sample", collecting)
        scenario.change(_0__Handle="!1", Init="!999")
        assert exporter.process.wait(timeout=60) == 3


def test_access_lost_from_the_start_does_not_end_it(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(Init="!999")
    with started(scenario, library, GPU_EXIT_ON_ACCESS_LOST="true") as exporter:
        exporter.until("two tries", lambda page: (page.value("gpu_exporter_failed_collects_total") or 0) >= 2)
        assert exporter.process.poll() is None


@pytest.mark.parametrize(("code", "state"), [("!18", "driver_mismatch"), ("!4", "no_permission"), ("!9", "no_driver")])
def test_what_is_wrong_with_the_driver_has_a_name(code: str, state: str, library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(Init=code)
    with started(scenario, library) as exporter:
        exporter.until(state, lambda page: page.state() == state)
        assert exporter.event("collect_failed", state=state)["advice"]
        scenario.change(Init=None)
        exporter.until("recovery", collecting)


def test_without_a_driver_it_starts_says_so_and_finds_it_later(library: Path, tmp_path: Path) -> None:
    scenario, empty = Scenario(tmp_path, "h100"), tmp_path / "lib"
    empty.mkdir()
    with started(scenario, empty) as exporter:
        page = exporter.until("no driver", lambda page: page.state() == "no_driver")
        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (0, 0)
        assert exporter.event("collect_failed", state="no_driver")["level"] == "info"
        assert exporter.get("/health")[0] == 200
        assert exporter.get("/energy")[0] == 503
        shutil.copy(library / LIBRARY, empty / "incomplete")
        (empty / "incomplete").rename(empty / LIBRARY)
        exporter.until("the driver", collecting)


def test_a_driver_without_gpus_is_told_and_tried_again(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path)
    with started(scenario, library) as exporter:
        exporter.until("no GPU", lambda page: page.state() == "no_gpu")
        scenario.add(0, "h100")
        scenario.change(Count="1")
        exporter.until("a GPU", collecting)


def test_a_gpu_that_is_added_is_found(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library, GPU_DISCOVER_SECONDS="0.3") as exporter:
        exporter.until("one GPU", collecting)
        scenario.add(1, "h100")
        scenario.change(Count="2")
        page = exporter.until("the second", lambda page: page.value("gpu_visible") == 2)
        assert page.value("gpu_expected") == 2
        exporter.event("gpu_found", uuid=scenario.uuid(1))


def test_a_driver_without_version_calls_is_read_all_the_same(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(DriverVersion="!13", NVMLVersion="!13", CudaDriverVersion="!3")
    with started(scenario, library) as exporter:
        page = exporter.until("a sample", collecting)

        assert page.value("gpu_power_watts", gpu="0") == 412.35
        assert page.value("gpu_driver_info", driver_version="", cuda_version="", nvml_version="") == 1
