"""The census asks every GPU but those that would hang it."""

from __future__ import annotations

import pynvml
import pytest

from gpu_exporter.nvml import Nvml


def test_it_asks_no_gpu_that_it_is_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    noted: list[str] = []

    def handle(index: int) -> int:
        asked.append(index)
        if index == 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda gpu: f"GPU-{gpu}")
    nvml = Nvml(noted.append, processes=False, pcie_throughput=False)

    assert nvml.census({1}) == ["GPU-0", "GPU-3"]
    assert asked == [0, 2, 3]
    assert noted[-1] == "3 nvmlDeviceGetUUID"  # one that hangs all the same is named
