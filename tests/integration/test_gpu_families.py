"""What the exporter says of GPUs that work: golden pages, every family, both kinds of names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.doubles.nvml.running import Exporter, Page
from tests.doubles.nvml.scenario import Scenario, build

from gpu_exporter.dcgm import FIELDS, XID
from gpu_exporter.native import FAMILIES, MIG_FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden" / "gpu"
# What differs from run to run.
VOLATILE = re.compile(
    r"^((?:# (?:HELP|TYPE) )?process_.*|(gpu_exporter_(last_(collect|hang)_(timestamp|duration)_seconds|collects_total)|"
    r"gpu_xid_last_timestamp_seconds(\{.*\})?|gpu_pcie_(transmitted|received)_bytes_total\{.*\}|"
    r"DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL\{.*\})) .*\n",
    re.MULTILINE,
)
MIG = {
    "_0__MigMode": "1 1",
    "_0__UtilizationRates": "!3",
    "_0__mig0__UUID": "MIG-0b6e2f52-0000-5000-8000-000000000001",
    "_0__mig0__Name": "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "_0__mig0__GpuInstanceId": "1",
    "_0__mig0__ComputeInstanceId": "0",
    "_0__mig0__MemoryInfo_v2": "42144366592 48234496 10000000000 32096132096",
    "_0__mig3__UUID": "MIG-0b6e2f52-0000-5000-8000-000000000002",
    "_0__mig3__Name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "_0__mig3__GpuInstanceId": "9",
    "_0__mig3__ComputeInstanceId": "0",
    "_0__mig3__MemoryInfo_v2": "10468982784 17170432 10451812352 0",
    **{f"_0__gi1__Gpm__{metric}": f"{metric}.5" for metric in (1, 2, 3, 5, 10)},
}
# In no GPU of `gpus/` at once: opt-in families, and what only some boards have.
RARE = {
    "_0__NumFans": "1",
    "_0__FanSpeed_v2__0": "55",
    "_0__Field__29__0": "1",
    "_0__Field__30__0": "0",
    "_0__RetiredPagesPendingStatus": "0",
    "_0__PcieThroughput__0": "2048",
    "_0__PcieThroughput__1": "4096",
    "_0__TemperatureThreshold__0": "95",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def sampled(scenario: Scenario, library: Path, **environment: str) -> Page:
    """The page after the second sample: the first has no activity between samples."""
    with Exporter({**scenario.environment(library), "GPU_HOSTNAME": "box", **environment}) as exporter:
        return exporter.next_sample()


def compare(page: Page, name: str) -> None:
    text, golden = VOLATILE.sub("", page.text), GOLDEN / f"{name}.prom"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert golden.read_text() == text


@pytest.mark.parametrize("gpu", ["h100", "h200", "a100", "l4", "rtx4090"])
def test_each_described_gpu_has_its_page(gpu: str, library: Path, tmp_path: Path) -> None:
    compare(sampled(Scenario(tmp_path, gpu), library), gpu)


def test_pcie_bytes_are_added_up_and_do_not_go_round(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__Gpm__20="61440", _0__Gpm__21="0")  # MiB/s: the driver's 32 bits would go round each 67 ms
    with Exporter(scenario.environment(library)) as exporter:

        def told() -> tuple[float, float]:
            page = exporter.next_sample()
            at, sent = (
                page.value(name)
                for name in ("gpu_exporter_last_collect_timestamp_seconds", "gpu_pcie_transmitted_bytes_total")
            )
            assert at is not None
            assert sent is not None
            assert page.value("gpu_pcie_received_bytes_total") == 0
            return at, sent

        (began, before), (ended, after) = told(), told()
        for _ in range(8):
            ended, after = told()
        assert after - before == pytest.approx((ended - began) * 61440 * 2**20, rel=0.2)
        assert after > 2**33


def test_two_gpus_with_both_kinds_of_names(library: Path, tmp_path: Path) -> None:
    compare(sampled(Scenario(tmp_path, "h100", "h100"), library, METRIC_NAMES="both"), "2xh100-both")


def test_mig_devices_are_told_apart(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(**MIG)
    page = sampled(scenario, library, METRIC_NAMES="both")

    used = page.value("gpu_mig_memory_used_bytes", gpu="0", gpu_instance="1", compute_instance="0")
    assert used == 32096132096
    assert page.value("gpu_mig_sm_active_ratio", gpu_instance="1") == 0.025
    assert page.values("gpu_mig_sm_active_ratio", gpu_instance="9") == []
    assert page.value("DCGM_FI_DEV_FB_USED", GPU_I_ID="9", GPU_I_PROFILE="1g.10gb") == 0
    assert page.values("gpu_utilization_ratio") == []
    compare(page, "h100-mig-both")


def test_compute_instances_that_share_a_gpu_instance_are_measured_once(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    second = {key.replace("mig0", "mig1"): value for key, value in MIG.items() if "mig0" in key}
    scenario.change(**MIG)
    calls = sampled(scenario, library).value("gpu_exporter_last_collect_calls") or 0
    second |= {"_0__mig1__UUID": "MIG-0b6e2f52-0000-5000-8000-000000000003", "_0__mig1__ComputeInstanceId": "1"}
    second |= {"_0__mig0__Name": "NVIDIA H100 MIG 1c.3g.40gb", "_0__mig1__Name": "NVIDIA H100 MIG 2c.3g.40gb"}
    scenario.change(**second)
    page = sampled(scenario, library, METRIC_NAMES="both")

    for instance in ("0", "1"):
        assert page.value("gpu_mig_sm_active_ratio", gpu_instance="1", compute_instance=instance) == 0.025
    assert [s.labels["profile"] for s in page.samples if s.name == "gpu_mig_info"] == [
        "1c.3g.40gb",
        "2c.3g.40gb",
        "1g.10gb",
    ]
    # DCGM's labels know the GPU instance only.
    assert page.value("DCGM_FI_DEV_FB_USED", GPU_I_ID="1", GPU_I_PROFILE="3g.40gb") == 30609.2568359
    assert page.value("DCGM_FI_PROF_SM_ACTIVE", GPU_I_ID="1") == 0.025
    # Uuid, name, both ids and memory of the second; nothing of performance.
    assert (page.value("gpu_exporter_last_collect_calls") or 0) - calls == 5


def test_every_family_in_the_tables_is_filled_by_some_gpu(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(**{**MIG, **RARE, "_0__UtilizationRates": "10 20"})
    opt_in = {"GPU_PROCESSES": "true", "GPU_PCIE_THROUGHPUT": "true", "METRIC_NAMES": "both"}
    page = sampled(scenario, library, **opt_in)

    wanted = {row.name for row in (*FAMILIES, *MIG_FAMILIES, *FIELDS, XID)}
    # The parser appends `_total` to the counters of DCGM, which go without.
    assert wanted - page.names() - {name.removesuffix("_total") for name in page.names()} == set()
    # Process 4242 and 4243 are no processes of this machine, or of nobody's container: they still count.
    assert sum(page.values("gpu_process_memory_bytes")) == 73400320000


def test_a_gpu_that_supports_nothing_is_still_there(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path)
    scenario.answers |= {"Count": "1", "0.UUID": "GPU-bare"}
    scenario.change()
    page = sampled(scenario, library)

    assert page.value("gpu_up", uuid="GPU-bare", gpu="0") == 1
    assert page.value("gpu_exporter_last_collect_success") == 1
    assert {n for n in page.names() if not n.startswith("gpu_exporter")} == {
        "gpu_up",
        "gpu_info",
        "gpu_driver_info",
        "gpu_visible",
        "gpu_expected",
    }


def test_what_is_not_supported_is_asked_once(library: Path, tmp_path: Path) -> None:
    bare, full = Scenario(tmp_path), tmp_path / "full"
    bare.answers |= {"Count": "1", "0.UUID": "GPU-bare"}
    bare.change()
    full.mkdir()
    few = sampled(bare, library).value("gpu_exporter_last_collect_calls")
    many = sampled(Scenario(full, "h100"), library).value("gpu_exporter_last_collect_calls")

    assert few is not None
    assert many is not None
    assert few == 3 < many  # count, handle and uuid: all else was refused in the first sample


def test_a_failing_call_is_counted_and_leaves_the_rest(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__PowerUsage="!999", _0__TotalEnergyConsumption="!4", _0__Field__82__0="!27")
    page = sampled(scenario, library)

    assert page.values("gpu_power_watts") == page.values("gpu_memory_temperature_celsius") == []
    assert page.value("gpu_temperature_celsius", gpu="0") == 54
    failures = page.value("gpu_exporter_call_failures_total", call="nvmlDeviceGetPowerUsage", error="unknown")
    assert failures is not None
    assert failures >= 2
    # Permission is missing for good: told once.
    assert page.value("gpu_exporter_call_failures_total", error="no_permission") == 1


def test_what_is_no_number_is_left_out(library: Path, tmp_path: Path) -> None:
    """Performance monitoring divides by the time between two samples, which a driver may count as none."""
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__Gpm__2="nan", _0__Gpm__5="inf", _0__Field__82__0="18446744073709551615")
    page = sampled(scenario, library, METRIC_NAMES="both")

    absent = {"gpu_sm_active_ratio", "gpu_tensor_active_ratio", "gpu_memory_temperature_celsius"}
    assert not absent & page.names()
    assert page.value("gpu_graphics_engine_active_ratio", gpu="0") == 0.971


def test_an_older_driver_is_asked_by_the_older_names(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__Temperature__0="!13", _0__OlderTemperature__0="47")
    scenario.change(_0__CurrentClocksEventReasons="!13", _0__CurrentClocksThrottleReasons="0x40")
    scenario.change(_0__MemoryInfo_v2="!13", _0__MemoryInfo="1000 400 600")
    page = sampled(scenario, library)

    assert page.value("gpu_temperature_celsius", gpu="0") == 47
    assert page.value("gpu_clock_event_active", reason="hw_thermal_slowdown") == 1
    assert page.value("gpu_memory_used_bytes", gpu="0") == 600
    assert page.values("gpu_memory_reserved_bytes") == page.values("gpu_exporter_call_failures_total") == []


def test_names_of_one_kind_only(library: Path, tmp_path: Path) -> None:
    page = sampled(Scenario(tmp_path, "h100"), library, METRIC_NAMES="dcgm")

    assert not {"gpu_power_watts", "gpu_info"} & page.names()
    labels = next(s.labels for s in page.samples if s.name == "DCGM_FI_DEV_POWER_USAGE")
    assert labels == {
        "gpu": "0",
        "UUID": "GPU-9f3c1d52-7a64-4f0e-a1c3-5d2b8e7f1a01",
        "pci_bus_id": "00000000:18:00.0",
        "device": "nvidia0",
        "modelName": "NVIDIA H100 80GB HBM3",
        "Hostname": "box",
        "DCGM_FI_DRIVER_VERSION": "580.95.05",
    }


def test_promtool_finds_nothing_to_say_of_native_names() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on PATH (Debian: apt-get install prometheus)")
    for golden in ("h100", "h200", "a100", "l4", "rtx4090"):
        page = (GOLDEN / f"{golden}.prom").read_bytes()
        checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
