"""The pinned vLLM's own plan of a KV cache for a config.json, nothing loaded: run in the engine's Python.

`engine_kv_plan.py FOLDER GIB TP LENGTH STEP STEPS` prints a JSON object: tokens, sequences. Layers, heads and windows are
what vLLM reads from the configuration; grouping, blocks and the bytes a sequence needs are its own code.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch  # type: ignore[import-not-found]  # the engine's own
from vllm.config import set_current_vllm_config  # type: ignore[import-not-found]
from vllm.engine.arg_utils import EngineArgs  # type: ignore[import-not-found]
from vllm.v1.core import kv_cache_utils  # type: ignore[import-not-found]
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec  # type: ignore[import-not-found]

if __name__ == "__main__":
    folder, (gib, tp, length, step, steps) = sys.argv[1], map(int, sys.argv[2:])
    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=length, max_num_batched_tokens=step,
        pipeline_parallel_size=steps, block_size=16, distributed_executor_backend="mp",
    )  # fmt: skip
    config = arguments.create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # the engine's core would ask the attention kernel for it
    assert config.max_in_flight_tokens == step * steps
    model, text = config.model_config, config.model_config.hf_text_config
    heads = model.get_num_kv_heads(SimpleNamespace(tensor_parallel_size=tp))
    shared = {"block_size": 16, "num_kv_heads": heads, "head_size": model.get_head_size(), "dtype": torch.bfloat16}
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    specs = {
        f"layers.{number}": SlidingWindowSpec(**shared, sliding_window=text.sliding_window)
        if kind == "sliding_attention"
        else FullAttentionSpec(**shared)
        for number, kind in enumerate(kinds)
    }
    with set_current_vllm_config(config):
        groups = kv_cache_utils.get_kv_cache_groups(config, specs)
        plan = kv_cache_utils.get_kv_cache_config_from_groups(config, groups, gib << 30)
        tokens, sequences = kv_cache_utils.get_kv_cache_capacity(config, plan)
    print(json.dumps({"tokens": tokens, "sequences": sequences}))
