"""Settings to argv and environment, word by word; all flags are the pinned version's."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.command import Place, argv, environment
from engine.settings import load

GPU = Place("gpu", "/usr/bin/python3", Path("/models/Qwen/Qwen3-8B"), ("Qwen/Qwen3-8B", "default"), 2)
CPU = Place("cpu", "/venv/bin/python", Path("/models/SmolLM2"), ("SmolLM2",), 1)
FLAGS = set((Path(__file__).parents[1] / "golden" / "engine" / "vllm-flags.txt").read_text().splitlines())
ALWAYS = "--middleware engine_progress.Progress"


def line(place: Place, **environ: str) -> str:
    words = argv(load(environ), place)
    assert {word for word in words if word.startswith("--")} <= FLAGS
    return " ".join(words)


def test_the_default_on_two_gpus() -> None:
    assert line(GPU) == (
        "/usr/bin/python3 -m vllm.entrypoints.openai.api_server --model /models/Qwen/Qwen3-8B --served-model-name "
        f"Qwen/Qwen3-8B default --host 127.0.0.1 --port 8000 {ALWAYS} --tensor-parallel-size 2 "
        "--pipeline-parallel-size 1 --shutdown-timeout 30 --disable-uvicorn-access-log --fingerprint-mode none "
        "--gpu-memory-utilization 0.9 --max-num-queued-reqs 512 --enable-prefix-caching"
    )


def test_the_default_on_cpu() -> None:
    assert line(CPU) == (
        "/venv/bin/python -m vllm.entrypoints.openai.api_server --model /models/SmolLM2 --served-model-name SmolLM2 "
        f"--host 127.0.0.1 --port 8000 {ALWAYS} --tensor-parallel-size 1 --pipeline-parallel-size 1 "
        "--shutdown-timeout 30 --disable-uvicorn-access-log --fingerprint-mode none --max-num-queued-reqs 512 "
        "--enable-prefix-caching"
    )


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"QUANTIZATION": "awq"}, "--quantization awq"),
        ({"DTYPE": "bfloat16"}, "--dtype bfloat16"),
        ({"MAX_MODEL_LEN": "32k"}, "--max-model-len 32k"),
        ({"MAX_NUM_SEQS": "64"}, "--max-num-seqs 64"),
        ({"MAX_NUM_BATCHED_TOKENS": "4096"}, "--max-num-batched-tokens 4096"),
        ({"GPU_MEMORY_UTILIZATION": "0.85"}, "--gpu-memory-utilization 0.85"),
        ({"KV_CACHE_DTYPE": "fp8"}, "--kv-cache-dtype fp8"),
        ({"KV_OFFLOADING_GB": "16"}, "--kv-offloading-size 16"),
        ({"SWAP_SPACE_GB": "4"}, "--kv-offloading-size 8"),  # was per GPU, is the sum
        ({"PP_SIZE": "2"}, "--pipeline-parallel-size 2"),
        ({"DISTRIBUTED_EXECUTOR": "ray"}, "--distributed-executor-backend ray"),
        ({"PREFIX_CACHING": "false"}, "--no-enable-prefix-caching"),
        ({"TOOL_CALL_PARSER": "hermes"}, "--tool-call-parser hermes"),
        ({"TOOL_CALL_PARSER": "hermes"}, "--enable-auto-tool-choice"),
        ({"REASONING_PARSER": "qwen3"}, "--reasoning-parser qwen3"),
        ({"LORA_MODULES": "sql=/a, de=/b"}, "--enable-lora --max-lora-rank 16 --lora-modules sql=/a de=/b"),
        ({"SPECULATIVE_CONFIG": '{"method": "ngram"}'}, '--speculative-config {"method": "ngram"}'),
        ({"MAX_NUM_QUEUED_TOKENS": "100000"}, "--max-num-queued-tokens 100000"),
        ({"DISABLE_CUSTOM_ALL_REDUCE": "true"}, "--disable-custom-all-reduce"),
        ({"ENGINE_EAGER": "true"}, "--enforce-eager"),
        ({"TRUST_REMOTE_CODE": "true"}, "--trust-remote-code"),
        ({"ENGINE_DRAIN_SECONDS": "5"}, "--shutdown-timeout 5"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://jaeger:4318"}, "--otlp-traces-endpoint http://jaeger:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "grpc://jaeger:4317"}, "--otlp-traces-endpoint grpc://jaeger:4317"),
        ({"VLLM_EXTRA_ARGS": "--seed 7 --no-enable-chunked-prefill"}, "--seed 7 --no-enable-chunked-prefill"),
        ({"VLLM_HOST": "0.0.0.0", "VLLM_PORT": "9000"}, "--host 0.0.0.0 --port 9000"),
    ],
)
def test_each_setting_becomes_its_argument(environ: dict[str, str], words: str) -> None:
    assert f" {words} " in f"{line(GPU, **environ)} "


def test_no_wall_means_no_argument() -> None:
    assert "--max-num-queued" not in line(GPU, MAX_NUM_QUEUED_REQS="0")


def test_secrets_are_in_the_environment_alone() -> None:
    settings = load({"VLLM_API_KEY": "secret-key", "HF_TOKEN": "hf-token"})
    assert "secret-key" not in " ".join(argv(settings, GPU))
    env = environment(settings, GPU, {"HF_TOKEN": "hf-token"}, Path("/state"), "token")
    assert env["VLLM_API_KEY"] == "secret-key"
    assert "HF_TOKEN" not in env  # the engine runs offline


def test_vllm_does_not_see_our_names_and_runs_offline() -> None:
    base = {"PATH": "/bin", "VLLM_PORT": "8000", "VLLM_HOST": "0.0.0.0", "ENGINE_STATUS_PORT": "1", "PP_SIZE": ""}
    env = environment(load({}), GPU, base, Path("/state"), "token")
    assert {"VLLM_PORT", "VLLM_HOST", "ENGINE_STATUS_PORT", "PP_SIZE"} & set(env) == set()
    assert (env["HF_HUB_OFFLINE"], env["VLLM_CACHE_ROOT"], env["PYTHONPATH"]) == ("1", "/state/vllm", "/state/plugin")


def test_what_the_operator_sets_is_kept() -> None:
    base = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "600", "NCCL_P2P_DISABLE": "1", "VLLM_CACHE_ROOT": "/elsewhere"}
    env = environment(load({}), GPU, base, Path("/state"), "token")
    assert {name: env[name] for name in base} == base


def test_on_cpu_the_cache_is_sized_and_ranks_get_their_cores() -> None:
    two = Place("cpu", "python", Path("/m"), ("m",), 2)
    env = environment(load({"VLLM_CPU_KVCACHE_SPACE": "3"}), two, {}, Path("/state"), "token")
    assert (env["VLLM_CPU_KVCACHE_SPACE"], env["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "0|1")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in env


def test_on_gpus_a_collective_that_fails_ends_its_process_and_leaves_a_record() -> None:
    env = environment(load({}), GPU, {}, Path("/state"), "token")
    assert env["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == env["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(env["TORCH_FR_BUFFER_SIZE"]) > 0  # PyTorch calls TORCH_NCCL_TRACE_BUFFER_SIZE deprecated


def test_traces_follow_the_endpoints_protocol() -> None:
    for endpoint, protocol in (("http://j:4318", "http/protobuf"), ("grpc://j:4317", "grpc")):
        settings = load({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        env = environment(settings, GPU, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}, Path("/s"), "t")
        assert env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == protocol
