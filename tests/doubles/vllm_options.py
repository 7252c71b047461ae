"""The command line of the vLLM double."""

from __future__ import annotations

import argparse

KEEP_ALIVE_SECONDS = 5.0  # VLLM_HTTP_TIMEOUT_KEEP_ALIVE


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="vllm_server", description="A vLLM that needs no model.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="double")
    parser.add_argument("--alias", action="append", default=[], help="further served names")
    parser.add_argument("--api-key")
    parser.add_argument("--fingerprint", help="system_fingerprint; none by default, as with --fingerprint-mode none")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of an answer, unless told")
    parser.add_argument("--pace-ms", type=float, default=0.0)
    parser.add_argument("--prefill-ms", type=float, default=0.0)
    parser.add_argument("--keep-alive", type=float, default=KEEP_ALIVE_SECONDS)
    return parser.parse_args(argv)
