"""The rules' own tests, by promtool: every alert stays quiet, fires and resolves."""

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = sorted((Path(__file__).parents[2] / "prometheus/tests").glob("*.yml"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH (apt-get install prometheus)")
@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_promtool_rules(path: Path) -> None:
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
