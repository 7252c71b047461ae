"""The NVML double is laid out as pynvml expects."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest
from tests.doubles.nvml.scenario import LIBRARY, Scenario, build, described

STRUCTURES = (
    "nvmlPciInfo_t",
    "c_nvmlFieldValue_t",
    "c_nvmlProcessInfo_v3_t",
    "c_nvmlGpmMetric_t",
    "c_nvmlTemperature_v1_t",
    "c_nvmlMarginTemperature_v1_t",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_have_the_size_of_pynvmls(structure: str, library: Path) -> None:
    assert ctypes.CDLL(str(library / LIBRARY)).nvml_double_size(structure.encode()) == ctypes.sizeof(
        getattr(pynvml, structure)
    )


@pytest.mark.parametrize("gpu", ["h100", "a100", "l4", "rtx4090"])
def test_a_recording_of_the_double_is_what_it_was_told(gpu: str, library: Path, tmp_path: Path) -> None:
    """So that a recording made on a real machine can be trusted to replay as that machine answered."""
    scenario = Scenario(tmp_path, gpu)
    recording = subprocess.run(
        [sys.executable, "-c", "import pathlib, sys; from tests.doubles.nvml.recorder import record; print(*record(pathlib.Path(sys.argv[1])))", str(tmp_path)],
        env={**os.environ, **scenario.environment(library)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )  # fmt: skip
    lines = Path(recording.stdout.strip()).read_text().splitlines()
    recorded = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    told = described(gpu)
    anonymous = {key: recorded[key] for key in ("UUID", "Serial") if key in told}

    numbers = {
        key: _same_form(value) for key, value in {**told, **anonymous}.items() if key != "ComputeRunningProcesses"
    }
    assert {key: _same_form(value) for key, value in recorded.items()} == numbers
    assert anonymous["UUID"] != told["UUID"]


def _same_form(value: str) -> list[object]:
    """Numbers as numbers: 0x1ff and 511 are one. A group of one value may have been told more."""
    words: list[object] = []
    for word in value.split():
        try:
            words.append(float(int(word, 0)))
        except ValueError:
            words.append(word)
    return words
