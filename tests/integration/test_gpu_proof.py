"""scripts/gpu-proof, on a machine made of the NVML double and an nvidia-smi that says what it is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.doubles.nvml.scenario import Scenario, build

ROOT = Path(__file__).parents[2]
# nvidia-smi's answers for the H100 of the double, in the order in which the script asks.
SAYS = "81559, 70000, 10970, 589, 54, 61, 0.00, 700.00, 93, 48, 1980, 1755, 2619, 5, 16, 0, 2"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml"))


def proved(scenario: Scenario, library: Path, folder: Path, says: str) -> subprocess.CompletedProcess[str]:
    smi = folder / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] || echo '{scenario.uuid(0)}, {says}'\n")
    smi.chmod(0o755)
    environment = {**os.environ, **scenario.environment(library), "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "scripts/gpu-proof"), "--out", str(folder / "out"), "--seconds", "0.5"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_equal_values_are_equal_and_recorded(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__PowerUsage="0")  # the double's energy stands still
    done = proved(scenario, library, tmp_path, SAYS)

    assert (done.returncode, "DIFF" in done.stdout) == (0, False), done.stdout + done.stderr
    assert "everything equal" in done.stdout
    recorded = (tmp_path / "out/nvidia-h100-80gb-hbm3.txt").read_text()
    assert "\nField.165.17 1\n" in recorded
    assert scenario.uuid(0) not in recorded


def test_a_difference_is_told(library: Path, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path, "h100")
    scenario.change(_0__PowerUsage="0")
    done = proved(scenario, library, tmp_path, SAYS.replace("70000", "60000"))

    assert done.returncode == 1
    assert "DIFF memory.used: nvidia-smi 60000.0, exporter 70000.0" in done.stdout
    assert "1 values differ" in done.stdout


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "scripts/gpu-proof")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing was proved" in done.stderr
