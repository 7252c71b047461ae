"""One line that says why vLLM ended and what to change, from the last lines it printed."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Pattern in vLLM's output, what to say ({0} is the first group), whether another start can help.
_KNOWN: tuple[tuple[str, str, bool], ...] = (
    (r"unrecognized arguments: (.+)", "this vLLM does not know {0}: correct VLLM_EXTRA_ARGS", False),
    (r"argument (--[\w-]+.*)", "vLLM refuses {0}", False),
    (r"(?:CUDA out of memory|OutOfMemoryError)", "the GPUs are too small: `engine fit` says what fits", False),
    (r"Free memory on device .*? is less than", "GPU memory is taken by another process: see nvidia-smi", True),
    (
        r"No available memory for the cache blocks",
        "no room left for the KV cache: raise TP_SIZE",
        False,
    ),
    (
        r"(?:larger than the (?:available KV cache memory|maximum number of tokens)|KV cache is needed)",
        "MAX_MODEL_LEN does not fit the KV cache: lower it, or give it more memory (VLLM_CPU_KVCACHE_SPACE on CPU)",
        False,
    ),
    (
        r"([Tt]otal number of attention heads.*?must be divisible by.*)",
        "TP_SIZE does not divide the model's heads: {0}",
        False,
    ),
    (r"[Uu]nknown quantization method: ?(.+)", "QUANTIZATION is none that this vLLM knows: {0}", False),
    (r"(Quantization method specified in the model config.*)", "QUANTIZATION contradicts the model: {0}", False),
    (r"(.* quantization is currently not supported.*)", "{0}: choose another QUANTIZATION", False),
    (r"No space left on device", "the disk is full: free some space in ENGINE_STATE_DIR or /tmp", True),
    (r"[Aa]ddress already in use", "VLLM_PORT is taken by another program", True),
    (r"Model architectures? (.+?) (?:are|is) not supported", "this vLLM cannot run the model: {0}", False),
    (r"(NCCL error.*|ncclSystemError.*)", "{0}: try NCCL_P2P_DISABLE=1 or DISABLE_CUSTOM_ALL_REDUCE=true", True),
)
_EXCEPTION = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)")
_LONGEST = 400


def of(lines: Sequence[str], code: int) -> tuple[str, bool]:
    """The line, and whether starting again may help. `code` is the exit code, 128 + signal for a killed one."""
    for pattern, words, again in _KNOWN:
        for line in reversed(lines):
            if found := re.search(pattern, line):
                return _short(words.format(*(group.strip() for group in found.groups()))), again
    if code in (128 + 9, 128 + 15):
        return f"vLLM was killed by signal {code - 128}; out of memory if nobody did it", True
    for line in reversed(lines):
        if found := _EXCEPTION.search(line.strip()):
            return _short(f"{found[1]}: {found[2]}"), True
    last = lines[-1] if lines else "it printed nothing"
    return _short(f"vLLM ended with code {code}: {last}"), True


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
