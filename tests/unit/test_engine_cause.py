"""One line out of vLLM's last ones: what it was, what to change; and its log lines taken apart."""

from __future__ import annotations

import json

import pytest

from engine import cause, logs


@pytest.mark.parametrize(
    ("line", "code", "named", "again"),
    [
        ("api_server.py: error: unrecognized arguments: --swap-space 4", 2, "--swap-space 4", False),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", 1, "engine fit", False),
        (
            "ValueError: Total number of attention heads (9) must be divisible by tensor parallel size (2).",
            1,
            "TP_SIZE",
            False,
        ),
        ("  Value error, Unknown quantization method: awqq. Must be one of …", 1, "QUANTIZATION", False),
        ("OSError: [Errno 28] No space left on device", 1, "disk is full", True),
        ("OSError: [Errno 98] Address already in use", 1, "VLLM_PORT", True),
        (
            "ValueError: To serve at least one request, 9 GiB KV cache is needed, which is larger",
            1,
            "MAX_MODEL_LEN",
            False,
        ),
        ("RuntimeError: NCCL error: unhandled system error", 1, "NCCL_P2P_DISABLE", True),
        ("RuntimeError: something new", 1, "something new", True),
        ("just a line", 3, "code 3: just a line", True),
        ("just a line", 137, "signal 9", True),
    ],
)
def test_the_reason_in_one_line(line: str, code: int, named: str, again: bool) -> None:
    words, may_help = cause.of(["INFO before", line, "INFO after"], code)
    assert named in words.replace("INFO after", line)
    assert may_help is again
    assert "\n" not in words


def test_silence_and_endless_lines_are_borne() -> None:
    assert "printed nothing" in cause.of([], 1)[0]
    assert len(cause.of(["ValueError: " + "x" * 10_000], 1)[0]) <= 400


def test_vllms_lines_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO")
    text = logs.relay("(EngineCore pid=813) WARNING 11-23 06:54:09 [shm.py:871] No block found, token=abcdef123456")
    assert text == "No block found, token=********"
    line = json.loads(capsys.readouterr().out)
    assert (line["level"], line["event"], line["process"]) == ("warning", "vllm_log", "EngineCore")
    assert line["text"] == text
    assert logs.relay("Loading shards: 100%") == "Loading shards: 100%"
    assert logs.masked("Authorization: Bearer abcdefghijk") == "Authorization: Bearer ********"
