"""Makes a tiny random model of a given family, in the engine's Python: `engine_tiny_model.py FAMILY FOLDER TOKENIZER`.

Two layers and two KV heads, so that two processes can share it; the tokenizer is copied from another model's folder.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch  # type: ignore[import-not-found]  # the engine's own
from transformers import (  # type: ignore[import-not-found]
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MixtralConfig,
)

COMMON = {
    "vocab_size": 49152, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(num_hidden_layers=2, **COMMON),
    "gemma": lambda: Gemma3TextConfig(
        num_hidden_layers=6, sliding_window=512, layer_types=["sliding_attention"] * 5 + ["full_attention"],
        pad_token_id=2, **COMMON,
    ),
    "mixtral": lambda: MixtralConfig(num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, **COMMON),
}  # fmt: skip

if __name__ == "__main__":
    family, folder, tokenizer = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    if (tokenizer / "chat_template.jinja").is_file():
        shutil.copy(tokenizer / "chat_template.jinja", folder)
