"""The exporter's configuration."""

from __future__ import annotations

import pytest

from gpu_exporter.settings import BadConfiguration, Settings, load


def problems(environment: dict[str, str]) -> list[str]:
    with pytest.raises(BadConfiguration) as caught:
        load(environment)
    return caught.value.problems


def test_nothing_is_needed() -> None:
    settings = load({})
    assert (settings.gpu_exporter_host, settings.gpu_exporter_port, settings.metric_names, settings.demo_plan) == (
        "127.0.0.1",
        9101,
        "native",
        None,
    )


def test_an_empty_value_is_an_unset_one() -> None:
    assert load({"GPU_EXPORTER_PORT": "", "DEMO": "", "METRIC_NAMES": ""}).gpu_exporter_port == 9101


@pytest.mark.parametrize("name", [name.upper() for name in Settings.model_fields if name.startswith("gpu_")])
def test_a_slip_of_the_pen_finds_its_variable(name: str) -> None:
    assert problems({name[:-1] + name[-1] * 2: "1"}) == [
        f"{name[:-1] + name[-1] * 2}: no such variable; did you mean {name}?"
    ]


def test_the_engines_variable_is_not_ours() -> None:
    load({"GPU_MEMORY_UTILIZATION": "0.92", "VLLM_API_KEY": "x"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GPU_EXPORTER_PORT", "-1"),
        ("GPU_EXPORTER_PORT", "http"),
        ("GPU_SAMPLE_SECONDS", "0"),
        ("GPU_SAMPLE_SECONDS", "nan"),
        ("GPU_SAMPLE_SECONDS", "inf"),
        ("GPU_DEADLINE_SECONDS", "601"),
        ("GPU_EXPECTED", "-2"),
        ("GPU_PROCESSES", "perhaps"),
        ("METRIC_NAMES", "DCGM"),
        ("DEMO", "0xH100"),
        ("DEMO", "17xH100"),
        ("DEMO", "2 H100"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: str) -> None:
    (problem,) = problems({name: value})
    assert problem.startswith(f"{name}: ")


def test_every_problem_is_told_at_once() -> None:
    assert len(problems({"GPU_EXPORTER_PORT": "x", "GPU_TYPO": "1", "DEMO": "?", "GPU_EXPECTED": "y"})) == 4


def test_every_variable_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
