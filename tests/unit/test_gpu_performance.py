"""Performance monitoring is what happened between two good samples, whatever failed before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from gpu_exporter import calls, performance
from gpu_exporter.asking import Asking
from gpu_exporter.performance import MonitoredDevice
from gpu_exporter.readings import Identity, Reading

RATE = 1000.0  # of each metric, in NVML's unit


class Buffer:
    """A sample of the driver's: when and of what it was filled."""

    filled: tuple[float, object] | None = None


class Metric:
    nvmlReturn, value, metricId = 0, 0.0, 0


class Request:
    def __init__(self, version: int) -> None:
        self.sample1, self.sample2, self.numMetrics = Buffer(), Buffer(), 0
        self.metrics = [Metric() for _ in range(98)]


class DriverDouble:
    """GPM of one GPU: a clock moved by hand, errors to come, and the pairs of samples it was asked to compare."""

    def __init__(self) -> None:
        self.now = 1e6  # a machine that is up for days
        self.errors: list[int] = []
        self.pairs: list[tuple[tuple[float, object], tuple[float, object]]] = []

    def take(self, buffer: Buffer, of: object) -> None:
        if self.errors:
            raise pynvml.NVMLError(self.errors.pop(0))
        buffer.filled = (self.now, of)

    def compare(self, request: Request) -> None:
        assert request.sample1.filled is not None, "the driver was given a sample that was never taken"
        assert request.sample2.filled is not None
        self.pairs.append((request.sample1.filled, request.sample2.filled))
        for metric in request.metrics:
            metric.value = RATE


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> DriverDouble:
    driver = DriverDouble()
    answers = {
        "nvmlGpmQueryDeviceSupport": lambda handle: type("Support", (), {"isSupportedDevice": 1}),
        "nvmlGpmSampleAlloc": Buffer,
        "nvmlGpmSampleGet": lambda handle, buffer: driver.take(buffer, None),
        "nvmlGpmMigSampleGet": lambda handle, instance, buffer: driver.take(buffer, instance),
        "nvmlGpmMetricsGet": driver.compare,
        "c_nvmlGpmMetricsGet_t": Request,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(performance, "time", SimpleNamespace(monotonic=lambda: driver.now))
    return driver


class Gpu:
    """A monitored GPU and one sample of it after the other, five seconds apart."""

    def __init__(self, driver: DriverDouble) -> None:
        self.driver, self.ask = driver, Asking(lambda call: None)
        self.device = MonitoredDevice(object(), Identity(0, "GPU-1"))

    def sample(self, instance: int | None = None) -> dict[str, list[Reading]]:
        self.driver.now += 5
        found: dict[str, list[Reading]] = {}
        metrics = calls.PERFORMANCE if instance is None else calls.MIG_PERFORMANCE
        self.device.activity(self.ask, found, metrics, instance)
        return found


@pytest.fixture
def gpu(driver: DriverDouble) -> Any:
    return Gpu(driver)


def test_a_first_sample_that_fails_is_not_compared_with(gpu: Gpu) -> None:
    gpu.driver.errors = [pynvml.NVML_ERROR_TIMEOUT] * 2
    assert gpu.sample() == gpu.sample() == gpu.sample() == {}
    assert gpu.sample()["pcie_transmitted"] == [(RATE * calls.MIB * 5, ())]
    assert gpu.sample()["pcie_transmitted"] == [(RATE * calls.MIB * 10, ())]


def test_bytes_go_on_over_a_sample_that_fails_later(gpu: Gpu) -> None:
    gpu.sample()
    gpu.sample()
    gpu.driver.errors = [pynvml.NVML_ERROR_TIMEOUT]
    assert gpu.sample() == {}
    assert gpu.sample()["pcie_transmitted"] == [(RATE * calls.MIB * 15, ())]


@pytest.mark.parametrize(("refused", "other"), [(1, None), (None, 1), (1, 2)])
def test_what_refuses_to_be_measured_ends_the_activity_of_nothing_else(
    gpu: Gpu, refused: int | None, other: int | None
) -> None:
    gpu.driver.errors = [pynvml.NVML_ERROR_INVALID_ARGUMENT]
    for _ in range(2):
        assert gpu.sample(refused) == {}
        found = gpu.sample(other)
    assert found["sm_active"] == [(RATE * calls.PERCENT, ())]
    assert gpu.sample(refused) == {}
    assert not gpu.ask.failures


def test_an_instance_that_is_made_anew_begins_anew(gpu: Gpu) -> None:
    gpu.sample(1)
    assert gpu.sample(1)
    gpu.device.forget_all_but({2})
    assert gpu.sample(1) == {}
    gpu.driver.errors = [pynvml.NVML_ERROR_INVALID_ARGUMENT]
    assert gpu.sample(1) == gpu.sample(1) == {}
    gpu.device.forget_all_but({2})
    assert gpu.sample(1) == {}
    assert gpu.sample(1)
    assert all(newer - older == 5 for (older, _), (newer, _) in gpu.driver.pairs)
