"""Settings to vLLM's command line and environment: pure, so that tests pin both to the pinned version's `--help`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from engine.settings import Settings

# `python -m`, because the `vllm` program of the CPU build looks up a distribution named `vllm` and fails.
MODULE = "vllm.entrypoints.openai.api_server"
PROGRESS_MODULE = "engine_progress"  # engine/progress.py under a name of its own, see `environment`


@dataclass(frozen=True)
class Place:
    """What was found out about this machine before the command line is written."""

    device: Literal["gpu", "cpu"]
    python: str
    model: Path  # folder with the model's files
    served: tuple[str, ...]  # names callers use, the first one is shown
    tp: int
    interface: str | None = None  # that has this machine's address in a cluster


def argv(settings: Settings, place: Place) -> list[str]:
    """The whole command line. Secrets are not in it: everyone on the machine can read it."""
    words = [place.python, "-m", MODULE, "--model", str(place.model), "--served-model-name", *place.served]
    words += ["--host", settings.vllm_host, "--port", str(settings.vllm_port)]
    words += ["--middleware", f"{PROGRESS_MODULE}.Progress"]
    words += ["--tensor-parallel-size", str(place.tp), "--pipeline-parallel-size", str(settings.pp_size)]
    words += ["--shutdown-timeout", str(settings.engine_drain_seconds)]
    words.append("--disable-uvicorn-access-log")  # the gateway logs every call; here it would be mostly our probes
    words += ["--fingerprint-mode", "none"]  # the version is nobody's business, and streams come out alike
    if place.device == "gpu":
        words += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"]
    valued = {
        "--quantization": settings.quantization,
        "--dtype": settings.dtype if settings.dtype != "auto" else None,
        "--max-model-len": settings.max_model_len,
        "--max-num-seqs": settings.max_num_seqs,
        "--max-num-batched-tokens": settings.max_num_batched_tokens,
        "--kv-cache-dtype": settings.kv_cache_dtype,
        "--kv-offloading-size": _offloading(settings, place),
        "--distributed-executor-backend": settings.distributed_executor,
        "--chat-template": settings.chat_template,
        "--tool-call-parser": settings.tool_call_parser,
        "--reasoning-parser": settings.reasoning_parser,
        "--speculative-config": settings.speculative_config,
        "--max-num-queued-reqs": settings.max_num_queued_reqs or None,
        "--max-num-queued-tokens": settings.max_num_queued_tokens or None,
        "--otlp-traces-endpoint": _traces(settings)[0],
    }
    for flag, value in valued.items():
        if value is not None:
            words += [flag, str(value)]
    words.append("--enable-prefix-caching" if settings.prefix_caching else "--no-enable-prefix-caching")
    switches = {
        "--enable-auto-tool-choice": settings.tool_call_parser is not None,
        "--disable-custom-all-reduce": settings.disable_custom_all_reduce,
        "--enforce-eager": settings.engine_eager,
        "--trust-remote-code": settings.trust_remote_code,
    }
    words += [flag for flag, on in switches.items() if on]
    if adapters := [part.strip() for part in (settings.lora_modules or "").split(",") if part.strip()]:
        words += ["--enable-lora", "--max-lora-rank", str(settings.max_lora_rank), "--lora-modules", *adapters]
    return words + shlex.split(settings.vllm_extra_args)


def environment(settings: Settings, place: Place, base: Mapping[str, str], state: Path, token: str) -> dict[str, str]:
    """vLLM's environment: `base` without our names, with the caches in one place and the known traps set.

    `state` is the folder of caches and of the copy of engine/progress.py; `token` opens that page to the supervisor.
    """
    env = {name: value for name, value in base.items() if value != "" and not name.startswith("ENGINE_")}
    for ours in ("VLLM_HOST", "VLLM_PORT", "VLLM_PYTHON", "VLLM_EXTRA_ARGS", "VLLM_URL", "VLLM_IMAGE"):
        env.pop(ours, None)  # VLLM_PORT means another port inside vLLM
    for secret in ("VLLM_API_KEY", "HF_TOKEN", "RAY_TOKEN"):
        env.pop(secret, None)
        env.pop(f"{secret}_FILE", None)
    if settings.vllm_api_key is not None:
        env["VLLM_API_KEY"] = settings.vllm_api_key.get_secret_value()
    env["ENGINE_PROGRESS_TOKEN"] = token
    env["PYTHONPATH"] = str(state / "plugin")  # files of ours, none of our dependencies
    env["PYTHONUNBUFFERED"] = "1"  # the last line before a crash is the one that matters
    env["HF_HUB_OFFLINE"] = "1"  # the model is here; a look-up on the hub would hang without a network
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.setdefault("DO_NOT_TRACK", "1")
    # One volume holds what makes the second start faster than the first.
    env.setdefault("VLLM_CACHE_ROOT", str(state / "vllm"))
    env.setdefault("TRITON_CACHE_DIR", str(state / "triton"))
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(state / "inductor"))
    env.setdefault("FLASHINFER_WORKSPACE_BASE", str(state / "flashinfer"))
    env.setdefault("HF_HOME", str(state / "huggingface"))
    env.setdefault("XDG_CACHE_HOME", str(state / "cache"))
    if place.device == "gpu":
        # A collective that fails ends its process instead of spinning: a dead worker is noticed at once.
        env.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        # What was in flight is dumped when a collective times out; without a buffer there is nothing to dump.
        env.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        env.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        # Above the first-shape compilation, below vLLM's 300 s: the watchdog is the first to act, this is the second.
        env.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "180")
    else:
        # vLLM 0.32 saves what it compiled for a CPU whole, and cannot load it again (no "finalize_loading"): so
        # it compiled at every start. Without that the compiler's own cache serves, which is kept for each graph.
        env.setdefault("VLLM_USE_AOT_COMPILE", "0")
        env["VLLM_CPU_KVCACHE_SPACE"] = str(settings.vllm_cpu_kvcache_space)
        if place.tp > 1:
            # `auto` puts every rank on one core when there are few of them.
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(str(rank) for rank in range(place.tp)))
    if settings.ray_head_address and settings.ray_token is not None:
        env["RAY_ADDRESS"] = f"{settings.ray_head_address}:{settings.ray_port}"
        env["RAY_AUTH_MODE"] = "token"  # without it whoever reaches a port runs what he likes
        env["RAY_AUTH_TOKEN"] = settings.ray_token.get_secret_value()
        env["VLLM_HOST_IP"] = str(settings.ray_node_address)
        env["VLLM_CONFIG_ROOT"] = str(state / "config")  # what must not go to the other machines, see cluster.py
        env.setdefault("RAY_ROTATION_MAX_BYTES", str(16 << 20))  # its logs lie in a small memory disk
        env.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
        # A node whose head is gone ends after so many seconds instead of sixty, and can join the next one.
        env.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "10")
        if place.interface is not None:
            env.setdefault("NCCL_SOCKET_IFNAME", place.interface)
            env.setdefault("GLOO_SOCKET_IFNAME", place.interface)
    if protocol := _traces(settings)[1]:
        env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = protocol
        env.setdefault("OTEL_SERVICE_NAME", "vllm")
    env.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
    return env


def _offloading(settings: Settings, place: Place) -> str | None:
    if settings.kv_offloading_gb:
        return f"{settings.kv_offloading_gb:g}"
    if settings.swap_space_gb:  # was per GPU; vLLM's size today is the sum over all of them
        return f"{settings.swap_space_gb * place.tp * settings.pp_size:g}"
    return None


def _traces(settings: Settings) -> tuple[str | None, str | None]:
    """vLLM's endpoint and protocol for the appliance's one OTLP variable."""
    endpoint = settings.otel_exporter_otlp_endpoint
    if not endpoint:
        return None, None
    if urlsplit(endpoint).scheme in ("http", "https"):
        return endpoint.rstrip("/") + "/v1/traces", "http/protobuf"
    return endpoint, "grpc"
