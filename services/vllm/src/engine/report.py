"""`engine fit`: finds the model's shape and this machine's memory, prints the table and one sentence of advice."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from engine import fit, hub, memory, place, preflight, shape
from engine.fit import GIB, Plan
from engine.settings import GPU_MODEL, Settings


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is loaded."""

    name: str
    shape: shape.Shape
    weight_bytes: int  # of the checkpoint as it is


def find(settings: Settings, name: str) -> Model:
    """The model from its folder, or its headers from the hub. Raises `HubError` and `ShapeError`."""
    folder = place.model_dir(settings, name)
    if (folder / "config.json").is_file():
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise shape.ShapeError(f"its config.json cannot be read: {error}") from None
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    elif name.startswith((".", "/", "~")):
        raise shape.ShapeError("there is no such folder with a config.json in it")
    else:
        hub.quiet()
        token = settings.hf_token.get_secret_value() if settings.hf_token else None
        config, size = hub.headers(name, settings.model_revision, token)
    return Model(name, shape.read(config), size)


def run(settings: Settings, name: str | None, gpu_gib: float | None, as_json: bool) -> int:
    """Print the plan; 0 when the model fits as configured, 1 when not, 2 when that cannot be said."""
    chosen = name or settings.model_name or GPU_MODEL
    try:
        model = find(settings, chosen)
    except (hub.HubError, shape.ShapeError) as error:
        print(f"engine fit: {chosen}: {error}", file=sys.stderr)
        return 2
    found = memory.gpus()
    if gpu_gib is None and not found:
        print("engine fit: no GPU answers nvidia-smi; say their memory with --gpu-memory GIB", file=sys.stderr)
        return 2
    size = gpu_gib * GIB if gpu_gib is not None else float(min(found))
    wanted, rows, words = judge(settings, model, size)
    missing = gpu_gib is None and len(found) < wanted.tp * settings.pp_size
    if missing:
        words = f"no: TP_SIZE={wanted.tp} needs {wanted.tp * settings.pp_size} GPUs, this machine has {len(found)}"
    if as_json:
        shown = {"model": model.name, "gpu_gib": round(size / GIB, 2), "advice": words, "configured": asdict(wanted)}
        print(json.dumps({**shown, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        _print(settings, model, size, wanted, rows, words)
    return 0 if wanted.fits and not missing else 1


def judge(settings: Settings, model: Model, size: float) -> tuple[Plan, list[Plan], str]:
    """The configured plan, the table, and the advice, for GPUs of `size` bytes."""
    element = shape.BYTES.get(settings.kv_cache_dtype or "auto", 2.0)
    length = preflight.tokens(settings.max_model_len, model.shape.longest)
    share, tp = settings.gpu_memory_utilization, settings.tp_size or 2
    asked = (settings.quantization or "").lower()
    method = "fp8" if "fp8" in asked else "awq" if any(word in asked for word in ("awq", "gptq")) else "bf16"
    # The checkpoint's own size says more than a formula, unless vLLM is to quantize it while loading.
    known = model.weight_bytes if model.weight_bytes and (model.shape.quantization or not asked) else None
    batch = fit.gpu_batch(size, settings.pp_size, settings.max_num_batched_tokens, settings.max_num_seqs)
    wanted = fit.plan(
        model.shape, size * settings.pp_size, tp, method,  # stages split the layers: as one GPU of their sum
        share=share, length=length, batch=batch, element=element, weight_bytes=known,
    )  # fmt: skip
    rows = fit.table(model.shape, size, share=share, length=length, batch=batch, element=element)
    return wanted, rows, fit.advice(rows, wanted, model.shape, size, share=share, element=element, batch=batch)


def _print(settings: Settings, model: Model, size: float, wanted: Plan, rows: list[Plan], words: str) -> None:
    measured = model.shape
    element = shape.BYTES.get(settings.kv_cache_dtype or "auto", 2.0)
    per_token = measured.layers * measured.kv_layer_bytes(wanted.tp, element)
    print(f"{model.name}: {measured.parameters / 1e9:.2f} billion parameters, {measured.layers} layers")
    print(f"{measured.heads} heads, {measured.kv_heads} KV heads, context {measured.longest} tokens")
    on_disk = model.weight_bytes or measured.weight_bytes()  # a folder with nothing but its config.json: as bf16
    print(f"checkpoint {on_disk / GIB:.1f} GiB on disk, and about as much host memory for its pages")
    print(f"GPUs of {size / GIB:.1f} GiB, of which {settings.gpu_memory_utilization:.0%} are used")
    print(f"KV cache: {per_token:.0f} bytes a token and GPU at TP_SIZE={wanted.tp}\n")
    print(f"{'TP':>3} {'weights':8} {'GiB/GPU':>8} {'KV GiB':>7} {'tokens':>10} {'sequences':>10}  fits")
    for row in rows:
        cells = f"{row.tp:>3} {row.method:8} {row.weights / GIB:8.1f} {row.cache / GIB:7.1f} {row.capacity.tokens:>10}"
        print(f"{cells} {row.capacity.sequences:>10.1f}  {'yes' if row.fits else f'no: {row.problem}'}")
    print(f"\nas configured (TP_SIZE={wanted.tp}, {wanted.weights / GIB:.1f} GiB of weights a GPU): {words}")
