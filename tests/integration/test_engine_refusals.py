"""What cannot work is refused from outside: one line that says what to change, before anything loads."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doubles.engine_running import ENGINE, with_double
from tests.doubles.ports import free_port

SECONDS = 60  # they take about one; this machine may be busy
LARGE = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


def run(folder: Path, *words: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines of `engine WORDS`, with the double's model and Python unless changed."""
    base = with_double(folder).environment
    done = subprocess.run(
        [ENGINE, *words], env={**base, **environment}, check=False, capture_output=True, text=True, timeout=SECONDS
    )
    return done.returncode, [line for line in (done.stdout + done.stderr).splitlines() if line]


def model(folder: Path, **config: object) -> str:
    """A folder that looks like a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LARGE, **config}))
    (folder / "model.safetensors").write_bytes(b"\0" * 4096)
    return str(folder)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MODEL_NAME": "/nowhere/model"}, "MODEL_NAME: /nowhere/model is no folder with a model"),
        ({"QUANTIZATION": "awqq"}, "QUANTIZATION: awqq is no quantization of this vLLM; did you mean awq?"),
        ({"QUANTIZATION": "fp8"}, "QUANTIZATION=fp8 needs a GPU; leave it out on CPU"),
        ({"TP_SIZE": "3"}, "TP_SIZE: 3 does not divide the model's 2 attention heads; possible: 1, 2"),
        ({"VLLM_CPU_KVCACHE_SPACE": "100000"}, "take a smaller model, or lower VLLM_CPU_KVCACHE_SPACE"),
        ({"VLLM_PYTHON": "/nowhere/python"}, "VLLM_PYTHON: no such program: /nowhere/python"),
        ({"ENGINE_DEVICE": "gpu"}, "no NVIDIA GPU answers nvidia-smi"),
        ({"MAX_MODEL_LEN": "1000000"}, "MAX_MODEL_LEN: 1000000 is more than the model's 4096 tokens"),
        ({"ENGINE_STATE_DIR": "/proc/nothing"}, "ENGINE_STATE_DIR: /proc/nothing: "),
    ],
)
def test_serve_refuses_with_one_line(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    code, lines = run(tmp_path, "serve", **environment)
    assert code == 2
    [line] = lines
    assert words in line
    assert line.startswith("engine: ")


def test_a_contradiction_with_the_models_own_quantization(tmp_path: Path) -> None:
    place = model(tmp_path / "quantized", quantization_config={"quant_method": "gptq"}, max_position_embeddings=2048)
    code, lines = run(tmp_path, "serve", MODEL_NAME=place, QUANTIZATION="awq")
    assert (code, len(lines)) == (2, 1)
    assert "QUANTIZATION: awq contradicts the model, which is quantized with gptq: leave it out" in lines[0]


def test_a_context_that_the_cache_cannot_hold(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "serve", MODEL_NAME=model(tmp_path / "long"))
    assert (code, len(lines)) == (2, 1)
    assert "raise it, or set MAX_MODEL_LEN=8192" in lines[0]


def test_a_taken_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, lines = run(tmp_path, "serve", VLLM_PORT=str(taken.getsockname()[1]))
    assert (code, len(lines)) == (2, 1)
    assert "VLLM_PORT: cannot listen on" in lines[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64m") as disk:
        code, lines = run(tmp_path, "serve", ENGINE_STATE_DIR=str(disk))
    assert (code, len(lines)) == (2, 1)
    assert f"{disk} has 64 MiB free, 256 MiB are needed: free some" in lines[0]


def test_a_model_that_nobody_has_is_failed_soon_and_says_so(tmp_path: Path) -> None:
    """The name may be right tomorrow: `serve` tries, waits, and then says what to correct."""
    nobody = f"http://127.0.0.1:{free_port()}"
    with with_double(tmp_path, MODEL_NAME="nobody/has-this", HF_ENDPOINT=nobody) as engine:
        reason = engine.wait_for("failed", 120)["reason"]
    assert "nobody/has-this" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("words", "environment", "code", "said"),
    [
        (("--gpu-memory", "24"), {"TP_SIZE": "3"}, 1, "no: TP_SIZE=3 does not divide the model's 32 attention heads"),
        (("--gpu-memory", "24"), {"TP_SIZE": "1"}, 1, "set MAX_MODEL_LEN="),
        (
            ("--gpu-memory", "10"),
            {"TP_SIZE": "1", "MAX_MODEL_LEN": "4096"},
            1,
            "take a checkpoint in awq (or QUANTIZATION=awq)",
        ),
        (("--gpu-memory", "80"), {"TP_SIZE": "2"}, 0, "yes: "),
        ((), {}, 2, "no GPU answers nvidia-smi; say their memory with --gpu-memory GIB"),
        (("--gpu-memory", "24"), {"QUANTIZATION": "awqq"}, 2, "did you mean awq?"),
        (("--gpu-memory", "-24"), {}, 2, "--gpu-memory: must be GiB above 0"),
    ],
)
def test_fit_says_what_to_change(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], code: int, said: str
) -> None:
    place = model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # sizes come from the shape then
    got, lines = run(tmp_path, "fit", place, *words, **{"ENGINE_DEVICE": "gpu", **environment})
    assert got == code
    assert said in lines[-1]


def test_fit_estimates_the_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    place = model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()

    code, lines = run(tmp_path, "fit", place, "--gpu-memory", "80", ENGINE_DEVICE="gpu", TP_SIZE="2")

    assert code == 0
    (checkpoint,) = (line for line in lines if line.startswith("checkpoint "))
    assert not checkpoint.startswith("checkpoint 0.0 GiB")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "there is no such folder with a config.json in it"),
        ("[]", "its config.json is no JSON object"),
        ('{"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": "many"}',
         "its config.json has a value that cannot be used"),
    ],
)  # fmt: skip
def test_fit_of_what_is_no_model_is_one_line(tmp_path: Path, config: str | None, said: str) -> None:
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(config)

    code, lines = run(tmp_path, "fit", str(folder), "--gpu-memory", "24")

    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]
