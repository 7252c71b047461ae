"""`make test` says what is unsteady: what fails once more by itself fails the run, what passes then is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pathlib
import pytest

@pytest.mark.parametrize("one", [{ones}])
def test_of(one, request):
    flag = pathlib.Path(request.config.rootpath, one)
    failed_before = flag.exists()
    flag.touch()
    assert one.startswith("steady") or (failed_before and one.startswith("once")), one
"""


def verb(folder: Path, *ones: str) -> subprocess.CompletedProcess[str]:
    """`scripts/test` over a suite whose tests are steady, fail once, or fail always."""
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/test", folder / "scripts/test")
    for program in ("test-programs", "engine-cpu"):
        (folder / "scripts" / program).write_text("#!/bin/sh\n")
        (folder / "scripts" / program).chmod(0o755)
    for suite in ("unit", "integration", "engine", "stack"):
        (folder / "tests" / suite).mkdir(parents=True)
        (folder / "tests" / suite / f"test_{suite}.py").write_text("def test_steady(): pass\n")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers = long\n")
    (folder / "tests/unit/test_ones.py").write_text(SUITE.format(ones=", ".join(map(repr, ones))))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [folder / "scripts/test"],
        env={"PATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_what_passes_by_itself_is_named(tmp_path: Path) -> None:
    done = verb(tmp_path, "steady", "once a", "once b")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if "UNSTEADY" in line]
    assert [line.rpartition("::")[2] for line in told] == ["test_of[once a]", "test_of[once b]"]
    assert "2 failed, 2 passed" in done.stdout
    assert "== tests/stack" in done.stdout


@pytest.mark.parametrize(
    "ones",
    [("once a", "always"), ("once a", "once b", "once c", "once d")],
    ids=["twice", "many"],
)
def test_what_fails_twice_or_is_many_fails_the_run(tmp_path: Path, ones: tuple[str, ...]) -> None:
    done = verb(tmp_path, *ones)
    assert done.returncode == 1
    assert "UNSTEADY" not in done.stderr
    assert "failed in tests/unit" in done.stderr
    assert "== tests/stack" in done.stdout, "every suite runs, also after a failure"


def test_a_steady_run_says_nothing_of_it(tmp_path: Path) -> None:
    done = verb(tmp_path, "steady")
    assert (done.returncode, done.stderr) == (0, "")
