"""vLLM's answers that generate nothing: embeddings, rerank, score, tokenize, detokenize."""

from __future__ import annotations

import base64
import struct
import time
from typing import Any

from tests.doubles.vllm_engine import Engine, chat_tokens, prompt_list, text_tokens

POOLING = ("/v1/embeddings", "/v1/rerank", "/v1/score", "/rerank", "/score")
DIMENSIONS = 8


def texts(value: Any) -> list[str]:
    """A text or a list of texts."""
    return [value] if isinstance(value, str) else [v if isinstance(v, str) else str(v) for v in value]


def vector(tokens: int) -> list[float]:
    """A fixed embedding of a prompt of so many tokens."""
    return [round((tokens + i) / 1024, 6) for i in range(DIMENSIONS)]


def pool(path: str, body: dict[str, Any], model: str, identity: str) -> tuple[int, dict[str, Any]]:
    """Prompt tokens and answer. Raises KeyError with the name of a missing field."""
    created = int(time.time())
    if path.endswith("embeddings"):
        counts = prompt_list(body["input"])
        used = {"prompt_tokens": sum(counts), "total_tokens": sum(counts), "completion_tokens": 0}
        as_base64 = body.get("encoding_format") == "base64"
        rows = [
            {
                "index": i,
                "object": "embedding",
                "embedding": base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector(n))).decode()
                if as_base64
                else vector(n),
            }
            for i, n in enumerate(counts)
        ]
        head = {"id": f"embd-{identity}", "object": "list", "created": created, "model": model, "data": rows}
        return sum(counts), {
            **head,
            "usage": {**used, "prompt_tokens_details": None, "completion_tokens_details": None},
        }
    if path.endswith("rerank"):
        query, documents = body["query"], texts(body["documents"])
        total = sum(text_tokens(query) + text_tokens(d) for d in documents)
        results = [
            {"index": i, "document": {"text": d, "multi_modal": None}, "relevance_score": round(1 / (i + 2), 6)}
            for i, d in enumerate(documents)
        ]
        used = {"prompt_tokens": total, "total_tokens": total}
        return total, {"id": f"rerank-{identity}", "model": model, "usage": used, "results": results}
    first = texts(body["text_1"] if "text_1" in body else body["queries"])
    second = texts(body["text_2"] if "text_2" in body else body.get("documents", body.get("items", [])))
    pairs = [(first[0] if len(first) == 1 else first[i], other) for i, other in enumerate(second)]
    total = sum(text_tokens(a) + text_tokens(b) for a, b in pairs)
    rows = [{"index": i, "object": "score", "score": round(1 / (i + 2), 6)} for i in range(len(pairs))]
    used = {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}
    details = {"prompt_tokens_details": None, "completion_tokens_details": None}
    head = {"id": f"embd-{identity}", "object": "list", "created": created, "model": model, "data": rows}
    return total, {**head, "usage": {**used, **details}}


def tokenize(body: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """Token numbers 1..n of a prompt or of messages."""
    count = chat_tokens(body["messages"]) if body.get("messages") is not None else text_tokens(body["prompt"])
    return {
        "count": count,
        "max_model_len": engine.max_model_len,
        "tokens": list(range(1, count + 1)),
        "token_strs": None,
    }


def detokenize(body: dict[str, Any]) -> dict[str, Any]:
    """One word for each token."""
    return {"prompt": " ".join(f"t{number}" for number in body["tokens"])}
