"""A model's shape, from its config.json alone: what its weights and its KV cache weigh. Pure.

Names of fields differ between families of models; here they get one name each. Sources: the configurations of Llama,
Qwen, Mistral, Gemma, Mixtral, Qwen-MoE and DeepSeek as transformers reads them, and vLLM's kv_cache_interface for how
KV cache is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "half": 2.0, "auto": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0}
# Bytes a weight of a linear layer takes; 4-bit formats carry a scale and a zero point for each group of 128.
QUANTIZED = {"bf16": 2.0, "fp8": 1.0, "awq": 0.5 + (2.0 + 0.5) / 128}


class ShapeError(Exception):
    """The configuration is none of a decoder model that can be measured; the message says what is missing."""


@dataclass(frozen=True)
class Shape:
    """What counts for memory. Sizes are numbers of elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    longest: int  # tokens of context
    window: int | None  # tokens, of the layers with sliding attention
    window_layers: int
    latent: int | None  # elements a token and layer when keys and values are compressed together (MLA)
    linear_parameters: int  # of all linear layers, experts included
    embedding_parameters: int
    dtype: str
    quantization: str | None  # method that the checkpoint itself has

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.linear_parameters + self.embedding_parameters

    def weight_bytes(self, method: str = "bf16") -> float:
        """All weights under `method`; embeddings stay in two bytes, as vLLM leaves them."""
        return self.linear_parameters * QUANTIZED[method] + self.embedding_parameters * 2.0

    def kv_layer_bytes(self, tp: int, element: float = 2.0) -> float:
        """KV cache of one token in one layer on one of `tp` GPUs: heads are split, repeated when too few."""
        if self.latent is not None:
            return self.latent * element  # every GPU holds all of it
        return 2 * max(1, self.kv_heads // tp) * self.head_dim * element

    def divides(self, tp: int) -> str | None:
        """Why `tp` GPUs cannot share this model's layers, or None."""
        if self.heads % tp:
            fitting = [str(n) for n in range(1, min(self.heads, 16) + 1) if self.heads % n == 0]
            return f"{tp} does not divide the model's {self.heads} attention heads; possible: {', '.join(fitting)}"
        if self.latent is None and self.kv_heads % tp and tp % self.kv_heads:
            return f"{tp} neither divides the model's {self.kv_heads} KV heads nor is a multiple of them"
        return None


def read(config: Any) -> Shape:
    """The shape in a config.json. Raises `ShapeError`."""
    if not isinstance(config, Mapping):
        raise ShapeError("its config.json is no JSON object")
    try:
        return _read(config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:  # numbers as text, names for objects
        raise ShapeError(f"its config.json has a value that cannot be used: {error}") from None


def _read(config: Mapping[str, Any]) -> Shape:
    text: Mapping[str, Any] = config.get("text_config") or config
    layers, hidden, heads = (_need(text, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    vocab = int(text.get("vocab_size") or config.get("vocab_size") or _need(text, "vocab_size"))
    latent = None
    if text.get("kv_lora_rank"):
        latent = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    window, window_layers = _window(text, layers)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        longest=int(text.get("max_position_embeddings") or 4096),
        window=window,
        window_layers=window_layers,
        latent=latent,
        linear_parameters=_attention(text, layers, hidden, heads, kv_heads, head_dim) + _mlp(text, layers, hidden),
        embedding_parameters=vocab * hidden * (1 if tied else 2),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"),
        quantization=quantization.get("quant_method"),
    )


def _need(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ShapeError(f"its config.json has no {name}: not a text model that can be measured")
    return value


def _window(text: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """The sliding window and how many layers have it."""
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return None, 0
    if kinds := text.get("layer_types"):
        return int(window), sum(kind == "sliding_attention" for kind in kinds)
    if pattern := text.get("sliding_window_pattern"):  # every pattern-th layer sees everything
        return int(window), layers - layers // int(pattern)
    return int(window), layers


def _attention(text: Mapping[str, Any], layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    if text.get("kv_lora_rank"):
        rank, rope = int(text["kv_lora_rank"]), int(text.get("qk_rope_head_dim") or 0)
        nope, value = int(text.get("qk_nope_head_dim") or head_dim), int(text.get("v_head_dim") or head_dim)
        asking = hidden * heads * (nope + rope)
        if query_rank := text.get("q_lora_rank"):
            asking = int(query_rank) * (hidden + heads * (nope + rope))
        return layers * (asking + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden)
    return layers * hidden * head_dim * (2 * heads + 2 * kv_heads)


def _mlp(text: Mapping[str, Any], layers: int, hidden: int) -> int:
    inner = int(text.get("intermediate_size") or 4 * hidden)
    experts = next((int(text[n]) for n in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(n)), 0)
    if not experts:
        return layers * 3 * hidden * inner
    expert = int(text.get("moe_intermediate_size") or inner)
    shared = int(text.get("shared_expert_intermediate_size") or 0) + int(text.get("n_shared_experts") or 0) * expert
    dense = int(text.get("first_k_dense_replace") or 0) + len(text.get("mlp_only_layers") or ())
    sparse = layers - dense
    return dense * 3 * hidden * inner + sparse * (3 * hidden * (experts * expert + shared) + hidden * experts)
