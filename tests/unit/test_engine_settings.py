"""The engine's configuration: every problem at once, each naming the variable and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.settings import MANAGED, ConfigurationError, Settings, load, vllm_names


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as refused:
        load(environ)
    return refused.value.problems


def test_nothing_set_is_fine_and_empty_is_not_set() -> None:
    assert load({}) == load({"MODEL_NAME": "", "TP_SIZE": " ", "VLLM_API_KEY": ""})
    assert load({}).vllm_port == 8000


def test_a_typo_names_the_nearest() -> None:
    assert problems(ENGINE_HANG_SECOND="3") == [
        "ENGINE_HANG_SECOND: no such setting; did you mean ENGINE_HANG_SECONDS?"
    ]
    assert problems(VLLM_CPU_KVCACHE="3") == ["VLLM_CPU_KVCACHE: no such setting; did you mean VLLM_CPU_KVCACHE_SPACE?"]


def test_vllms_own_names_and_the_appliances_are_known() -> None:
    load(
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": "/x", "VLLM_URL": "http://x", "ENGINE_CONCURRENCY": "4"}
    )
    assert len(vllm_names()) > 200


def test_all_problems_at_once() -> None:
    found = problems(TP_SIZE="0", MAX_MODEL_LEN="long", VLLM_PORT="70000", ENGINE_NOPE="1")
    assert {line.partition(":")[0] for line in found} == {"TP_SIZE", "MAX_MODEL_LEN", "VLLM_PORT", "ENGINE_NOPE"}


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"SWAP_SPACE_GB": "4", "KV_OFFLOADING_GB": "8"}, "KV_OFFLOADING_GB"),
        ({"VLLM_PORT": "8001"}, "ENGINE_STATUS_PORT"),
        ({"ENGINE_HANG_SECONDS": "inf"}, "ENGINE_HANG_SECONDS"),
        ({"ENGINE_DEVICE": "cpu", "DISTRIBUTED_EXECUTOR": "ray"}, "DISTRIBUTED_EXECUTOR"),
        ({"ENGINE_DEVICE": "cpu", "QUANTIZATION": "fp8"}, "QUANTIZATION"),
        ({"ENGINE_HANG_SECONDS": "60", "ENGINE_HANG_MOST_SECONDS": "30"}, "ENGINE_HANG_MOST_SECONDS"),
        ({"VLLM_EXTRA_ARGS": "--tensor-parallel-size=4"}, "--tensor-parallel-size"),
        ({"VLLM_EXTRA_ARGS": "--seed 'x"}, "VLLM_EXTRA_ARGS"),
        ({"LORA_MODULES": "sql=/a,broken"}, "LORA_MODULES"),
        ({"SPECULATIVE_CONFIG": "[1]"}, "SPECULATIVE_CONFIG"),
        ({"CHAT_TEMPLATE": "/no/such/file"}, "CHAT_TEMPLATE"),
        ({"VLLM_PORT": "tcp://10.0.0.1:8000"}, "VLLM_PORT"),
    ],
)
def test_contradictions_are_refused(environ: dict[str, str], named: str) -> None:
    found = problems(**environ)
    assert len(found) == 1
    assert named in found[0]


def test_secrets_come_from_files_and_are_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("very-secret\n")
    settings = load({"VLLM_API_KEY_FILE": str(file)})
    assert settings.vllm_api_key is not None
    assert settings.vllm_api_key.get_secret_value() == "very-secret"
    assert "very-secret" not in f"{settings!r} {settings.hidden()}"
    assert problems(VLLM_API_KEY_FILE=str(file), VLLM_API_KEY="other") == [
        "VLLM_API_KEY_FILE: VLLM_API_KEY is set too; keep one of them"
    ]
    assert "cannot read" in problems(HF_TOKEN_FILE=str(tmp_path / "none"))[0]


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_managed_arguments_are_flags_of_the_pinned_version() -> None:
    golden = Path(__file__).parents[1] / "golden" / "engine" / "vllm-flags.txt"
    assert MANAGED - set(golden.read_text().splitlines()) == set()
