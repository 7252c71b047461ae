"""A GPU that gives nothing is told as such, also one that the exporter never got to know."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from tests.doubles.nvml.running import Exporter, Page
from tests.doubles.nvml.scenario import Scenario, build


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def exporter_of(scenario: Scenario, library: Path) -> Exporter:
    return Exporter({**scenario.environment(library), "METRIC_NAMES": "both"})


def no_series_twice(page: Page) -> bool:
    lines = Counter(line.rpartition(" ")[0] for line in page.text.splitlines() if not line.startswith("#"))
    return max(lines.values()) == 1


@pytest.mark.parametrize(("code", "reason"), [("!999", "failing"), ("!15", "lost")])
def test_gpus_that_are_unreadable_from_the_start_are_told_without_a_name(
    code: str, reason: str, library: Path, tmp_path: Path
) -> None:
    scenario = Scenario(tmp_path, "h100", "h100", "h100")
    scenario.change(_1__Handle=code, _2__Handle=code)
    with exporter_of(scenario, library) as exporter:
        page = exporter.until("a sample", lambda page: page.state() == "ok")

        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (1, 3)
        for gpu in ("1", "2"):
            assert page.value("gpu_up", uuid="", gpu=gpu) == 0
            assert page.value("gpu_unreadable", uuid="", gpu=gpu, reason=reason) == 1
        assert exporter.json("/health")["status"] == "degraded"
        exporter.event("gpu_unreadable", uuid="", gpu=1, reason=reason)
        assert no_series_twice(exporter.next_sample())
        assert len([line for line in exporter.logs if line["event"] == "gpu_unreadable"]) == 2  # said once

        scenario.change(_1__Handle=None, _2__Handle=None)
        page = exporter.until("all three", lambda page: page.value("gpu_visible") == 3)
        assert page.values("gpu_up", uuid="") == page.values("gpu_unreadable") == []
        exporter.event("gpu_found", uuid=scenario.uuid(1), gpu=1)


def test_a_machine_of_unreadable_gpus_has_gpus(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__Handle="!999")
    with exporter_of(scenario, library) as exporter:
        page = exporter.until("a sample", lambda page: page.state() == "ok")
        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (0, 1)
        exporter.next_sample()
        assert not [line for line in exporter.logs if line.get("state") == "no_gpu"]


def test_a_gpu_that_never_had_a_name_is_still_expected_when_it_leaves_the_list(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100")
    scenario.change(_1__Handle="!999")
    with exporter_of(scenario, library) as exporter:
        exporter.until("a sample", lambda page: page.value("gpu_expected") == 2)
        scenario.change(Count="1", Init="!9", _0__Handle="!1")  # the driver is unloaded …
        exporter.until("no driver", lambda page: page.state() == "no_driver")
        scenario.change(Init=None, _0__Handle=None)  # … and comes back with one GPU
        page = exporter.until("one GPU", lambda page: page.value("gpu_visible") == 1)
        assert page.value("gpu_expected") == 2


def test_a_gpu_whose_every_call_fails_is_not_up(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100", "h100", "h100")
    failing = {f"_{key.replace('.', '__')}": "!999" for key in scenario.answers if key[0] in "12" and "UUID" not in key}
    failing |= {f"_{gpu}__{call}": "!999" for gpu in "12" for call in ("FieldValues", "GpmSample")}
    healthy = {key: scenario.answers.get(key.removeprefix("_").replace("__", ".")) for key in failing}
    scenario.change(**failing)
    with exporter_of(scenario, library) as exporter:
        page = exporter.next_sample()

        assert page.value("gpu_up", uuid=scenario.uuid(1), gpu="1") == 0
        assert page.value("gpu_unreadable", uuid=scenario.uuid(1), reason="failing") == 1
        assert (page.value("gpu_visible"), page.value("gpu_expected")) == (1, 3)
        assert no_series_twice(page)

        scenario.change(**healthy)
        page = exporter.until("its return", lambda page: page.value("gpu_visible") == 3)
        names = [s.labels["name"] for s in page.samples if s.name == "gpu_info"]
        assert names == ["NVIDIA H100 80GB HBM3"] * 3


def test_what_nobody_may_read_is_no_failing_gpu(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path)
    scenario.answers |= {"Count": "1", "0.UUID": "GPU-bare", "0.PowerUsage": "!4"}
    scenario.change()
    with exporter_of(scenario, library) as exporter:
        assert exporter.next_sample().value("gpu_up", uuid="GPU-bare") == 1
        assert not [line for line in exporter.logs if line["event"] == "gpu_unreadable"]
