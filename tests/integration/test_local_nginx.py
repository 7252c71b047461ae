"""nginx missing on a machine without Docker: installed where that is possible, else told in one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scripts.local import start


def without_nginx(monkeypatch: pytest.MonkeyPatch, uid: int, *there: str) -> None:
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(start, "program", lambda name: Path("/usr/bin", name) if name in there else None)


@pytest.mark.parametrize(("uid", "there"), [(1000, ["apt-get"]), (0, [])])
def test_where_it_cannot_be_installed_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, uid: int, there: list[str]
) -> None:
    without_nginx(monkeypatch, uid, *there)
    with pytest.raises(start.StartError, match="apt-get install nginx") as missing:
        start.nginx_program()
    assert "\n" not in str(missing.value)


def test_root_on_a_debian_system_installs_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_nginx(monkeypatch, 0, "apt-get")
    asked: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(argv)
        if "install" in argv:
            monkeypatch.setattr(start, "program", lambda name: Path("/usr/sbin/nginx") if name == "nginx" else None)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert start.nginx_program() == Path("/usr/sbin/nginx")
    assert [argv[2] for argv in asked] == ["update", "install"]
    assert "installing it with apt-get" in capsys.readouterr().out


def test_an_installation_that_fails_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nginx(monkeypatch, 0, "apt-get")
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package nginx\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(start.StartError, match="Unable to locate package"):
        start.nginx_program()
