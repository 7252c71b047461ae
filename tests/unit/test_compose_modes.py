"""Which form is chosen and what `.env` may say: decisions over plain values."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts.daytwo import settings
from scripts.local import example, mode, plan, start, variables
from scripts.local import settings as local_settings
from scripts.local.machine import Docker

import engine.settings
import gateway.settings
import gpu_exporter.settings

GOOD = Docker(True, None, False, (2, 40), True, "/var/lib/docker")
NO_NVIDIA = Docker(True, None, False, (2, 40), False, "/var/lib/docker")
NONE = Docker(False, "docker is not installed")
DENIED = Docker(True, "no permission", denied=True)


@pytest.mark.parametrize(
    ("wanted", "docker", "gpus", "chosen"),
    [
        ("", GOOD, 2, "gpu"),
        ("", NO_NVIDIA, 0, "cpu"),
        ("", NONE, 0, "local"),
        ("", NONE, 2, "local"),
        ("gpu", GOOD, 4, "gpu"),
        ("cpu", GOOD, 2, "cpu"),
        ("local", DENIED, 0, "local"),
        (" LOCAL ", GOOD, 2, "local"),
    ],
)
def test_the_form_follows_the_machine_and_MODE_overrides(wanted: str, docker: Docker, gpus: int, chosen: str) -> None:
    choice = mode.choose(wanted, docker, gpus, 2)
    assert choice.mode == chosen
    assert choice.why
    assert (choice.files == []) == (chosen == "local")


@pytest.mark.parametrize(
    ("wanted", "docker", "gpus", "words"),
    [
        ("both", GOOD, 2, "not one of gpu, cpu, local"),
        ("gpu", NONE, 2, "docker is not installed"),
        ("cpu", NONE, 0, "docker is not installed"),
        ("", DENIED, 2, "refuses this user"),
        ("gpu", GOOD, 1, "TP_SIZE=1"),
        ("", GOOD, 1, "asks for 2 GPUs"),
        ("gpu", GOOD, 0, "shows 0"),
        ("gpu", NO_NVIDIA, 2, "NVIDIA Container Toolkit"),
    ],
)
def test_what_cannot_run_says_what_to_do(wanted: str, docker: Docker, gpus: int, words: str) -> None:
    with pytest.raises(mode.ModeError) as refused:
        mode.choose(wanted, docker, gpus, 2)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_env_files_are_read_as_compose_reads_them(tmp_path: Path) -> None:
    text = (
        "# comment\n\nA=1\nexport B = 2\n".replace(" = ", "=")
        + "C='a # b'\nD=\"x y\"\nE=plain # comment\nF=\nG='x' # why\n"
    )
    read = {"A": "1", "B": "2", "C": "a # b", "D": "x y", "E": "plain", "F": "", "G": "x"}
    assert variables.parse(text) == read
    file = tmp_path / ".env"
    file.write_text(text)
    assert settings.dotenv(file) == read, "the day-two verbs read another file than `make up` does"


@pytest.mark.parametrize("line", ["no equals", "1A=2", "=x", "A-B=1"])
def test_a_line_that_is_no_assignment_is_named(line: str) -> None:
    with pytest.raises(variables.VariablesError) as bad:
        variables.parse(f"GOOD=1\n{line}\n")
    assert "line 2" in bad.value.problems[0]


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z][A-Z0-9_]{0,20}", fullmatch=True), st.from_regex(r"[a-zA-Z0-9:/._@=-]*", fullmatch=True)
    )
)
def test_plain_values_survive(values: dict[str, str]) -> None:
    assert variables.parse("".join(f"{name}={value}\n" for name, value in values.items())) == values


def test_unknown_and_contradictory_names_are_told_all_at_once(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("HTTPS_PROT=8443\nMODEL_NAME=x\nNONSENSE_THING=1\n")
    environment = {"GATEWAY_ADMIN_KYE": "x", "VLLM_API_KEY": "a", "VLLM_API_KEY_FILE": "/b", "EDITOR": "vi"}
    with pytest.raises(variables.VariablesError) as bad:
        variables.load(environment, file)
    text = "\n".join(bad.value.problems)
    assert "HTTPS_PROT in .env is not known; did you mean HTTPS_PORT?" in text
    assert "NONSENSE_THING in .env is not known" in text
    assert "did you mean GATEWAY_ADMIN_KEY?" in text
    assert "VLLM_API_KEY and VLLM_API_KEY_FILE are both set" in text
    assert len(bad.value.problems) == 4


@pytest.mark.parametrize("name", variables.SECRETS)
def test_a_secret_in_a_file_is_for_processes_and_not_for_containers(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of-the-file\n")
    given = {f"{name}_FILE": str(tmp_path / "secret"), "APPLIANCE_STATE": str(tmp_path / "state")}
    assert variables.load(given, tmp_path / ".env") == given
    assert [line.split(":")[0] for line in variables.not_for_containers(given)] == [f"{name}_FILE"]
    assert variables.not_for_containers({name: "x", f"{name}_FILE": " "}) == []
    local = local_settings.read(given)
    assert {name, f"{name}_FILE"} & set(plan.engine_environment(local)) <= {"VLLM_API_KEY_FILE"}
    if name in ("GATEWAY_API_KEYS", "DATABASE_URL", "BACKENDS"):
        theirs = plan.gateway_environment(local)
        assert (theirs.get(name), theirs[f"{name}_FILE"]) == (None, given[f"{name}_FILE"])
    elif name in local_settings.READ_HERE:
        assert local.environment[name] == "of-the-file"
        start.prepare(local)
        kept = {path.name: path.read_text() for path in (tmp_path / "state").glob("*-secrets/*")}
        assert kept.get(name.lower(), "of-the-file") == "of-the-file"


@pytest.mark.parametrize(
    "service", [gateway.settings, engine.settings, gpu_exporter.settings], ids=lambda one: one.__name__
)
def test_every_line_of_the_example_may_be_given_to_every_program(service: ModuleType, tmp_path: Path) -> None:
    """In local mode they share one environment, so each must leave the others' and Compose's own variables alone."""
    lines = re.findall(r"^#? ?([A-Z][A-Z0-9_]*=.*)$", example.EXAMPLE.read_text(), re.MULTILINE)
    (tmp_path / ".env").write_text("\n".join(lines))
    given = variables.load({}, tmp_path / ".env")
    assert set(given) == variables.known()
    local_settings.read(given)
    service.load(given)


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("MODEL_NAME=of-the-file\nHTTP_PORT=81\n")
    loaded = variables.load({"MODEL_NAME": "of-the-shell"}, file)
    assert (loaded["MODEL_NAME"], loaded["HTTP_PORT"]) == ("of-the-shell", "81")
