"""What fits: shapes from real model cards, the KV cache as vLLM counts it, and the advice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import fit, preflight, shape
from engine.fit import GIB

# The fields that count, from the models' published config.json, and the parameters their cards state.
LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672,
}  # fmt: skip
QWEN_8B = {
    "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
GEMMA_27B = {
    "text_config": {
        "num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "intermediate_size": 21504, "vocab_size": 262208, "max_position_embeddings": 131072,
        "sliding_window": 1024, "sliding_window_pattern": 6, "tie_word_embeddings": True,
    }
}  # fmt: skip
MIXTRAL = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8,
}  # fmt: skip
QWEN_MOE = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960,
}  # fmt: skip
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (LLAMA_8B, 8.03),
        (LLAMA_70B, 70.6),
        (QWEN_8B, 8.19),
        (GEMMA_27B, 27.0),
        (MIXTRAL, 46.7),
        (QWEN_MOE, 30.5),
        (DEEPSEEK_V3, 671.0),
    ],
)
def test_parameters_as_on_the_model_card(config: dict[str, object], billions: float) -> None:
    assert shape.read(config).parameters / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    ("config", "tp", "layer_bytes"),
    [(LLAMA_8B, 1, 4096), (LLAMA_8B, 4, 1024), (LLAMA_8B, 16, 512), (QWEN_MOE, 8, 512), (DEEPSEEK_V3, 8, 1152)],
)
def test_kv_cache_of_a_token_in_a_layer(config: dict[str, object], tp: int, layer_bytes: int) -> None:
    """Heads are split, repeated when there are more GPUs than heads, and a compressed cache is whole everywhere."""
    assert shape.read(config).kv_layer_bytes(tp) == layer_bytes


def test_layers_with_a_window_are_counted() -> None:
    gemma = shape.read(GEMMA_27B)
    assert (gemma.window, gemma.window_layers, gemma.layers) == (1024, 52, 62)
    kinds = GEMMA_27B["text_config"] | {"layer_types": ["sliding_attention"] * 40 + ["full_attention"] * 22}
    assert shape.read({"text_config": kinds}).window_layers == 40


def test_a_cache_without_windows_holds_its_bytes_worth_of_tokens() -> None:
    llama = shape.read(LLAMA_8B)
    room = fit.capacity(llama, 10 * GIB, 8192, in_flight=8192)
    assert room.tokens == pytest.approx(10 * GIB / (32 * 4096), rel=0.001)
    assert room.sequences == pytest.approx(room.tokens / 8192, rel=0.001)


def test_windows_make_long_sequences_cheap() -> None:
    gemma = shape.read(GEMMA_27B)
    plain = shape.read({"text_config": GEMMA_27B["text_config"] | {"sliding_window": None}})
    windows, without = (fit.capacity(each, 10 * GIB, 65536, in_flight=2048).sequences for each in (gemma, plain))
    assert windows > 3 * without


@pytest.mark.parametrize(("tp", "fine"), [(1, True), (2, False), (3, True), (9, True), (4, False)])
def test_gpus_must_divide_the_heads(tp: int, fine: bool) -> None:
    small = shape.read({"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "vocab_size": 49152})
    reason = small.divides(tp)
    assert (reason is None) is fine
    if reason:
        assert "possible: 1, 3, 9" in reason


@pytest.mark.parametrize(
    ("config", "gib", "tp", "method", "length", "fits"),
    [
        (QWEN_8B, 24, 2, "bf16", 40960, True),  # the default of the appliance
        (QWEN_8B, 24, 1, "bf16", 40960, False),
        (LLAMA_70B, 48, 2, "awq", 32768, True),  # the preset for two larger GPUs
        (LLAMA_70B, 48, 2, "bf16", 4096, False),
        (LLAMA_70B, 80, 4, "bf16", 32768, True),
        (MIXTRAL, 24, 2, "bf16", 4096, False),
    ],
)
def test_known_pairs(config: dict[str, object], gib: int, tp: int, method: str, length: int, fits: bool) -> None:
    batch = fit.gpu_batch(gib * GIB, 1)
    assert fit.plan(shape.read(config), gib * GIB, tp, method, share=0.9, length=length, batch=batch).fits is fits


def advised(config: dict[str, object], gib: int, tp: int, method: str = "bf16", length: int | None = None) -> str:
    measured = shape.read(config)
    wanted_length = length or measured.longest
    batch = fit.gpu_batch(gib * GIB, 1)
    rows = fit.table(measured, gib * GIB, share=0.9, length=wanted_length, batch=batch)
    wanted = fit.plan(measured, gib * GIB, tp, method, share=0.9, length=wanted_length, batch=batch)
    return fit.advice(rows, wanted, measured, gib * GIB, share=0.9, element=2.0, batch=batch)


def test_advice_names_the_smallest_change() -> None:
    assert advised(QWEN_8B, 24, 2).startswith("yes")
    assert "MAX_MODEL_LEN=" in advised(LLAMA_8B, 24, 1)  # weights fit, 131072 tokens do not
    assert "fp8" in advised(LLAMA_70B, 48, 2, length=8192)
    assert "TP_SIZE=" in advised(MIXTRAL, 24, 1, length=4096)
    assert "smaller model" in advised(DEEPSEEK_V3, 24, 4)


def test_what_is_no_text_model_says_so() -> None:
    with pytest.raises(shape.ShapeError, match="num_hidden_layers"):
        shape.read({"model_type": "something"})


@given(
    st.sampled_from([LLAMA_8B, QWEN_8B, GEMMA_27B, MIXTRAL, QWEN_MOE]),
    st.floats(1, 100),
    st.floats(1, 100),
    st.integers(1024, 131072),
)
def test_more_memory_never_holds_less(config: dict[str, object], less: float, more: float, length: int) -> None:
    measured = shape.read(config)
    low, high = sorted((less, more))
    held = [fit.capacity(measured, gib * GIB, length, in_flight=8192).tokens for gib in (low, high)]
    assert held == sorted(held)


@pytest.mark.parametrize(("given_", "tokens"), [(None, 100), ("auto", 100), ("32k", 32000), ("32K", 32768), ("77", 77)])
def test_lengths_are_read_as_vllm_reads_them(given_: str | None, tokens: int) -> None:
    assert preflight.tokens(given_, 100) == tokens
