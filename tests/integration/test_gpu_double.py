"""The NVML double is laid out as pynvml expects."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pynvml
import pytest
from tests.doubles.nvml.scenario import LIBRARY, build

STRUCTURES = (
    "nvmlPciInfo_t",
    "c_nvmlFieldValue_t",
    "c_nvmlProcessInfo_v3_t",
    "c_nvmlGpmMetric_t",
    "c_nvmlTemperature_v1_t",
    "c_nvmlMarginTemperature_v1_t",
)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_have_the_size_of_pynvmls(structure: str, tmp_path: Path) -> None:
    library = ctypes.CDLL(str(build(tmp_path) / LIBRARY))
    assert library.nvml_double_size(structure.encode()) == ctypes.sizeof(getattr(pynvml, structure))
