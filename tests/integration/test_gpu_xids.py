"""XIDs are heard of every GPU that answers, whatever the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.doubles.nvml.running import HANGING, collecting, started
from tests.doubles.nvml.scenario import Scenario, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def test_xids_are_counted_by_gpu_and_number(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    with started(scenario, library, METRIC_NAMES="both") as exporter:
        exporter.until("a sample", collecting)
        scenario.xid(1, 79)
        scenario.xid(0, 31, 2)
        page = exporter.until("both", lambda page: len(page.values("gpu_xid_errors_total")) == 2)

        assert page.value("gpu_xid_errors_total", uuid=scenario.uuid(1), gpu="1", xid="79") == 1
        assert page.value("gpu_xid_errors_total", uuid=scenario.uuid(0), gpu="0", xid="31") == 2
        assert (page.value("gpu_xid_last_timestamp_seconds", gpu="1", xid="79") or 0) > 1e9
        assert page.value("DCGM_FI_DEV_XID_ERRORS", gpu="1", modelName="NVIDIA H100 80GB HBM3") == 79
        assert page.value("DCGM_FI_DEV_XID_ERRORS", gpu="0") == 31
        assert exporter.event("xid", xid=79)["uuid"] == scenario.uuid(1)


def test_an_xid_storm_is_counted_whole_in_few_lines(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library) as exporter:
        exporter.until("a sample", collecting)
        scenario.xid(0, 94, 50_000)
        exporter.until("all", lambda page: page.value("gpu_xid_errors_total", xid="94") == 50_000)
        assert len([entry for entry in exporter.logs if entry["event"] == "xid"]) < 100
        assert exporter.page().state() == "ok"  # the storm does not keep samples from being taken


def test_xids_outlive_the_data_and_the_probe(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    with started(scenario, library, **HANGING) as exporter:
        exporter.until("a sample", collecting)
        scenario.xid(0, 79)
        scenario.change(_0__PowerUsage="hang")
        exporter.until("the hang", lambda page: page.state() == "hung")
        page = exporter.until("the XID", lambda page: page.values("gpu_xid_errors_total", xid="79"))
        assert page.values("gpu_temperature_celsius") == []


def test_a_gpu_that_cannot_report_events_does_not_silence_the_other(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    scenario.change(_0__RegisterEvents="!3")
    with started(scenario, library) as exporter:
        exporter.until("a sample", collecting)
        scenario.xid(1, 48)
        exporter.until("the XID", lambda page: page.value("gpu_xid_errors_total", gpu="1", xid="48") == 1)


def test_events_that_cannot_be_waited_for_are_a_failure_by_name(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(EventSetWait="!999")
    with started(scenario, library) as exporter:
        failed = {"call": "nvmlEventSetWait_v2", "error": "unknown"}
        page = exporter.until("it", lambda page: page.values("gpu_exporter_call_failures_total", **failed))
        assert page.state() == "ok"


def test_events_are_heard_again_when_they_can_be_waited_for(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    scenario.change(EventSetWait="!999")
    with started(scenario, library) as exporter:
        failed = {"call": "nvmlEventSetWait_v2", "error": "unknown"}
        exporter.until("it", lambda page: sum(page.values("gpu_exporter_call_failures_total", **failed)) >= 2)
        scenario.change(EventSetWait=None)
        exporter.next_sample()
        exporter.next_sample()
        scenario.xid(0, 31)
        scenario.xid(1, 48)
        exporter.until("both", lambda page: len(page.values("gpu_xid_errors_total")) == 2)


@pytest.mark.parametrize("call", ["Handle", "UUID", "RegisterEvents"])
def test_a_gpu_that_hangs_does_not_silence_the_other(call: str, library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    healthy = {f"_1__{call}": scenario.answers.get(f"1.{call}")}
    scenario.change(**{f"_1__{call}": "hang"})
    with started(scenario, library, **HANGING) as exporter:
        exporter.until("the hang", lambda page: page.state() == "hung")
        assert exporter.event("collect_failed", state="hung")["gpu"] == 1
        exporter.until("the healthy GPU", lambda page: page.value("gpu_visible") == 1)
        scenario.xid(0, 79)
        page = exporter.until("its XID", lambda page: page.value("gpu_xid_errors_total", gpu="0", xid="79") == 1)
        assert page.value("gpu_unreadable", gpu="1", reason="hung") == 1
        scenario.change(**healthy)


def test_a_gpu_that_fails_to_register_is_counted_and_tried_again(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    scenario.change(_1__RegisterEvents="!999")
    with started(scenario, library) as exporter:
        page = exporter.next_sample()
        failed = {"call": "nvmlDeviceRegisterEvents", "error": "unknown"}
        assert (page.value("gpu_exporter_call_failures_total", **failed) or 0) >= 2
        assert page.value("gpu_visible") == 2
        scenario.change(_1__RegisterEvents=None)
        exporter.next_sample()
        scenario.xid(1, 48)
        exporter.until("its XID", lambda page: page.value("gpu_xid_errors_total", gpu="1", xid="48") == 1)
