"""The dialects, without I/O: which routes exist, what a request asks for, what its bytes become for the engine.

Requests are parsed only as far as needed: top-level fields stay raw bytes (`msgspec.Raw`), and the body that goes to
the engine is built from them, so unknown fields travel untouched and a key that stands twice stands once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.call import Priority
from gateway.errors import InvalidRequest

Raw = msgspec.Raw


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One relayed route. `name` is a metric label and ledger value; `upstream` is vLLM's path.

    `output_field` is the field that bounds the output (None: the endpoint generates nothing).
    """

    name: str
    path: str
    upstream: str
    dialect: str  # openai | responses | messages
    output_field: str | None = None
    default_output: int | None = None  # what the engine generates when the field is missing; None = to its length
    multipart: bool = False
    streams: bool = False
    metered: bool = True


ENDPOINTS: dict[str, Endpoint] = {
    e.path: e
    for e in (
        Endpoint("chat_completions", "/v1/chat/completions", "/v1/chat/completions", "openai",
                 "max_completion_tokens", streams=True),
        Endpoint("completions", "/v1/completions", "/v1/completions", "openai", "max_tokens", 16, streams=True),
        Endpoint("embeddings", "/v1/embeddings", "/v1/embeddings", "openai"),
        Endpoint("rerank", "/v1/rerank", "/v1/rerank", "openai"),
        Endpoint("score", "/v1/score", "/v1/score", "openai"),
        Endpoint("responses", "/v1/responses", "/v1/responses", "responses", "max_output_tokens", streams=True),
        Endpoint("messages", "/v1/messages", "/v1/messages", "messages", "max_tokens", streams=True),
        Endpoint("count_tokens", "/v1/messages/count_tokens", "/v1/messages/count_tokens", "messages",
                 metered=False),
        Endpoint("transcriptions", "/v1/audio/transcriptions", "/v1/audio/transcriptions", "openai",
                 multipart=True, streams=True),
        Endpoint("tokenize", "/v1/tokenize", "/tokenize", "openai", metered=False),
        Endpoint("detokenize", "/v1/detokenize", "/detokenize", "openai", metered=False),
    )
}  # fmt: skip


class Request:
    """What one body asks for.

    `prompt_bound` is an upper bound of the prompt's tokens, `prompt_estimate` a likely number; `max_output` is what
    the caller asked for per choice (None: nothing), `output_limit` what the budget stage decided (None: leave it).
    """

    __slots__ = (
        "affinity", "body_bytes", "endpoint", "fields", "max_output", "media", "model", "n", "output_limit",
        "priority", "prompt_bound", "prompt_estimate", "raw", "stream", "wants_running_usage", "wants_usage",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, raw: bytes, model: str) -> None:
        self.endpoint = endpoint
        self.raw = raw
        self.body_bytes = len(raw)
        self.model = model  # as the caller named it
        self.fields: dict[str, Raw] = {}
        self.stream = False
        self.wants_usage = False  # the caller asked for the final usage chunk
        self.wants_running_usage = False  # … for usage on every chunk
        self.n = 1  # sequences generated: n (or best_of) times prompts
        self.media = 0
        self.max_output: int | None = None
        self.output_limit: int | None = None
        self.prompt_bound = 0
        self.prompt_estimate = 0
        self.priority: Priority | None = None
        self.affinity: int | None = None  # same conversation, same number

    @property
    def output_tokens(self) -> int | None:
        """Most tokens that the call can generate over all choices; None while nothing bounds it."""
        if self.endpoint.output_field is None:
            return 0
        limit = self.output_limit if self.output_limit is not None else self.max_output
        return None if limit is None else limit * self.n


def decode(raw: bytes) -> dict[str, Raw]:
    """The top-level fields of a JSON object as raw bytes. Raises `InvalidRequest`."""
    try:
        return msgspec.json.decode(raw, type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body must be one JSON object.") from None


def field(fields: dict[str, Raw], name: str, kind: Any) -> Any:
    """The field `name` as `kind`, or None if it is missing or null. Raises `InvalidRequest` naming it."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest(f"'{name}' has the wrong type.", param=name) from None
