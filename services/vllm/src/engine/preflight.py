"""What can be known before anything loads: refused in a second with one line, not in minutes with a traceback."""

from __future__ import annotations

import json
import shutil
import socket
from typing import Any

from engine import cluster, fit, memory, place, shape
from engine.command import Place
from engine.settings import ConfigurationError, Settings

_STATE_BYTES = 256 << 20  # compile caches and evidence


def check(settings: Settings, there: Place) -> None:
    """Raises `ConfigurationError` with every reason why this cannot start. A model that is not here yet is not read."""
    problems = _disk(settings) + _port(settings) + _machine(settings, there)
    if settings.ray_head_address and not cluster.is_head(settings):
        problems.append(
            "RAY_NODE_ADDRESS: not the first machine's (RAY_HEAD_ADDRESS): run `engine node` here, not serve"
        )
    if place.is_present(there.model):
        problems += _model(settings, there)
    elif not place.belongs_to_cache(settings, there.model):
        problems.append(f"MODEL_NAME: {there.model} is no folder with a model (config.json and *.safetensors)")
    if problems:
        raise ConfigurationError(problems)


def check_node(settings: Settings, there: Place) -> None:
    """The same for `engine node`, which loads what the first machine tells it to."""
    problems = _disk(settings) + _machine(settings, there)
    if not settings.ray_head_address:
        problems.append("RAY_HEAD_ADDRESS, RAY_NODE_ADDRESS and RAY_TOKEN are missing: which cluster? (docs/engine.md)")
    elif cluster.is_head(settings):
        problems.append(
            "RAY_NODE_ADDRESS: the first machine's own (RAY_HEAD_ADDRESS): run `engine serve` here, not node"
        )
    if not place.is_present(there.model):
        problems.append(
            f"MODEL_NAME: {there.model} is not here: `engine fetch` brings it; each machine reads its own copy"
        )
    if problems:
        raise ConfigurationError(problems)


def _machine(settings: Settings, there: Place) -> list[str]:
    found = _gpus(settings, there) if there.device == "gpu" else []
    return found + (cluster.problems(settings, there) if settings.ray_head_address else [])


def _disk(settings: Settings) -> list[str]:
    folder = settings.engine_state_dir.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"ENGINE_STATE_DIR: {folder}: {error.strerror}"]
    if free < _STATE_BYTES:
        return [f"ENGINE_STATE_DIR: {folder} has {free >> 20} MiB free, {_STATE_BYTES >> 20} MiB are needed: free some"]
    return []


def _port(settings: Settings) -> list[str]:
    """Another program on vLLM's port would answer our questions in its place."""
    host, port = settings.vllm_host, settings.vllm_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that is closing does not count
        try:
            probe.bind((host, port))
        except OSError as error:
            return [f"VLLM_PORT: cannot listen on {host}:{port}: {error.strerror}"]
    return []


def _gpus(settings: Settings, there: Place) -> list[str]:
    count, needed = len(memory.gpus()), cluster.gpus_each(settings, there.tp)
    if count >= needed or (settings.distributed_executor == "ray" and settings.ray_head_address is None):
        return []
    if count == 0:
        return ["no NVIDIA GPU answers nvidia-smi: see that the driver and the container toolkit work"]
    here = f" on each of {settings.engine_nodes} machines" if settings.engine_nodes > 1 else ""
    return [f"TP_SIZE: {there.tp} with PP_SIZE {settings.pp_size} needs {needed} GPUs{here}, this machine has {count}"]


def _model(settings: Settings, there: Place) -> list[str]:
    try:
        config: dict[str, Any] = json.loads((there.model / "config.json").read_text(encoding="utf-8"))
        measured = shape.read(config)
    except (OSError, ValueError) as error:
        return [f"MODEL_NAME: {there.model}/config.json cannot be read: {error}"]
    except shape.ShapeError:
        return []  # not a decoder we can measure; vLLM decides
    problems = []
    if (reason := measured.divides(there.tp)) is not None:
        problems.append(f"TP_SIZE: {reason}")
    own, asked = measured.quantization, settings.quantization
    if own and asked and own.lower() not in asked.lower() and asked.lower() not in own.lower():
        problems.append(f"QUANTIZATION: {asked} contradicts the model, which is quantized with {own}: leave it out")
    length = tokens(settings.max_model_len, measured.longest)
    if length > measured.longest and not config.get("rope_scaling"):
        problems.append(f"MAX_MODEL_LEN: {length} is more than the model's {measured.longest} tokens")
    if not problems and there.device == "cpu":
        problems += _host(settings, there, measured, length)
    return problems


def _host(settings: Settings, there: Place, measured: shape.Shape, length: int) -> list[str]:
    weights = sum(file.stat().st_size for file in there.model.glob("*.safetensors"))
    cache = settings.vllm_cpu_kvcache_space * fit.GIB
    batch = fit.cpu_batch(there.tp * settings.pp_size, settings.max_num_batched_tokens)
    room = fit.capacity(measured, cache, length, in_flight=batch.in_flight, tp=there.tp, block=128)
    if room.sequences < 1 and settings.max_model_len != "auto":
        possible = max(room.tokens // 128 * 128, 128)
        holds = f"{settings.vllm_cpu_kvcache_space} GiB hold {room.tokens} tokens, less than one sequence of {length}"
        return [f"VLLM_CPU_KVCACHE_SPACE: {holds}: raise it, or set MAX_MODEL_LEN={possible}"]
    needed, free = weights + cache * there.tp + fit.GIB * (1 + there.tp), memory.available()
    if free < needed:
        lacking = f"the model needs about {needed / fit.GIB:.1f} GiB of memory, {free / fit.GIB:.1f} GiB are free"
        return [f"{lacking}: take a smaller model, or lower VLLM_CPU_KVCACHE_SPACE"]
    return []


def tokens(given: str | None, longest: int) -> int:
    """`MAX_MODEL_LEN` as a number: 32k is 32000 and 32K is 32768, as vLLM reads them."""
    if given is None or given == "auto":
        return longest
    if given[-1] in "kK":
        return int(given[:-1]) * (1000 if given[-1] == "k" else 1024)
    return int(given)
