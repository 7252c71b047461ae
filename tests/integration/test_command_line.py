"""The programs' command lines: help helps, and what is not understood is refused instead of ignored."""

import subprocess
import sys

import pytest


def run(module: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environ, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("asked", ["--help", "-h"])
@pytest.mark.parametrize(("module", "verb"), [("gateway", "serve"), ("gateway", "check"), ("gpu_exporter", "")])
def test_help_starts_nothing(module: str, verb: str, asked: str):
    answer = run(module, *filter(None, (verb, asked)))

    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith("usage: ")


@pytest.mark.parametrize(
    "arguments",
    [("gateway", "serve", "--port", "1"), ("gateway", "check", "x"), ("gpu_exporter", "--port=1"), ("gateway", "x")],
)
def test_what_is_not_understood_is_refused(arguments: tuple[str, ...]):
    answer = run(*arguments)

    assert (answer.returncode, answer.stdout) == (2, "")
    assert "usage: " in answer.stderr


@pytest.mark.parametrize(("name", "value"), [
    ("DATABASE_URL", "sqlite:////nonesuch/gateway.sqlite3"), ("GATEWAY_HOST", "203.0.113.1"),
])  # fmt: skip
def test_what_fails_at_the_start_is_told_with_its_variable(name: str, value: str, tmp_path: object):
    environ = {"DATABASE_URL": f"sqlite:///{tmp_path}/g.sqlite3", "GATEWAY_PORT": "0", name: value}

    answer = run("gateway", "serve", **environ)

    assert answer.returncode == 2
    assert answer.stderr.startswith("gateway: ")
    assert name in answer.stderr
    assert "Traceback" not in answer.stderr
