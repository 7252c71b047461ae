"""The engine inside the vLLM double: sequences, exact token counts, and vLLM's `/metrics`.

Nothing here is random. A prompt has `prompt_tokens(text)` tokens, the i-th generated token is a fixed word, and every
request leaves a record, so that a test can compare a gateway's ledger with what was really done.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from dataclasses import asdict, dataclass, field
from typing import Any

WORDS = ("The ", "quick ", "brown ", "füchs ", "jumps ", "over ", "the ", "lazy ", "🙂 ", "dog. ")
# Words that look like framing or like fields a proxy edits; JSON escapes what must be escaped.
TRICKY = (
    '"usage":{"prompt_tokens":9}',
    "data: [DONE]\n\n",
    "\u2028",
    ',"usage":null',
    '{"error":1}',
    "\\",
    "event: error\n",
)
MESSAGE_TOKENS = 4  # what the chat template adds for each message
MEDIA_TOKENS = 64  # each image or audio part


def text_tokens(text: str) -> int:
    """Tokens of a text: its whitespace-separated words."""
    return len(text.split())


def content_tokens(content: Any) -> int:
    """Tokens of a message's content: a text or a list of parts."""
    if isinstance(content, str):
        return text_tokens(content)
    if isinstance(content, list):
        return sum(
            text_tokens(part.get("text", "")) if "text" in part else MEDIA_TOKENS
            for part in content
            if isinstance(part, dict)
        )
    return 0


def chat_tokens(messages: list[dict[str, Any]]) -> int:
    """Prompt tokens of a conversation."""
    return sum(MESSAGE_TOKENS + content_tokens(m.get("content")) for m in messages)


def prompt_list(prompt: Any) -> list[int]:
    """Prompt tokens of each prompt of a completions or embeddings body: text, texts, tokens, or lists of tokens."""
    if isinstance(prompt, str):
        return [text_tokens(prompt)]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return [len(prompt)]
    if isinstance(prompt, list):
        return [text_tokens(p) if isinstance(p, str) else len(p) for p in prompt]
    return [0]


@dataclass
class Record:
    """What happened to one request. Times are Unix seconds."""

    number: int
    path: str
    request_id: str | None  # the x-request-id header
    headers: dict[str, str]
    body_sha256: str
    body_bytes: int
    body: str
    state: str = "received"  # waiting, prefill, decode, done, cancelled, died, refused
    stream: bool = False
    prompt_tokens: int = 0  # counted once prefill is done, as vLLM does
    completion_tokens: int = 0  # generated, whether or not anybody read them
    events: int = 0  # pieces of the answer given to the socket
    directive: str = ""
    received_at: float = field(default_factory=time.time)
    first_token_at: float | None = None
    ended_at: float | None = None

    def end(self, state: str) -> None:
        """Close the record; the first ending wins."""
        if self.ended_at is None:
            self.state = state
            self.ended_at = time.time()


class Engine:
    """Sequences with a limit (`max_num_seqs`), counters, and the list of records."""

    def __init__(self, model: str, max_num_seqs: int, max_model_len: int) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.records: list[Record] = []
        self.running = 0
        self.waiting = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.iterations = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.most_running = 0
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._numbers = itertools.count(1)

    def record(self, path: str, headers: dict[str, str], body: bytes) -> Record:
        """Begin the record of a request."""
        entry = Record(
            number=next(self._numbers),
            path=path,
            request_id=headers.get("x-request-id"),
            headers=headers,
            body_sha256=hashlib.sha256(body).hexdigest(),
            body_bytes=len(body),
            body=body[:100_000].decode("utf-8", "replace"),
        )
        self.records.append(entry)
        return entry

    async def schedule(self, record: Record) -> None:
        """Wait for a place in the batch. Pair with `free`."""
        record.state = "waiting"
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        record.state = "prefill"

    def free(self, record: Record, reason: str) -> None:
        """Leave the batch for `reason` (a finished_reason of vLLM)."""
        self.running -= 1
        self._slots.release()
        self.finished[reason] += 1

    def prefilled(self, record: Record, tokens: int) -> None:
        """The prompt has been computed."""
        record.prompt_tokens = tokens
        record.state = "decode"
        self.prompt_tokens += tokens
        self.iterations += 1

    def generated(self, record: Record, tokens: int = 1) -> None:
        """`tokens` have been generated."""
        if record.first_token_at is None:
            record.first_token_at = time.time()
        record.completion_tokens += tokens
        self.generation_tokens += tokens
        self.iterations += 1

    def state(self) -> dict[str, Any]:
        """Counts for tests."""
        return {
            "running": self.running,
            "waiting": self.waiting,
            "most_running": self.most_running,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "requests": len(self.records),
        }

    def requests(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return [asdict(record) for record in self.records]

    def metrics(self) -> str:
        """`/metrics` with vLLM 0.32's names."""
        base = f'engine="0",model_name="{self.model}"'
        lines: list[str] = []

        def family(name: str, kind: str, *samples: tuple[str, str, float]) -> None:
            lines.append(f"# TYPE vllm:{name} {kind}")
            for suffix, labels, value in samples:
                extra = f",{labels}" if labels else ""
                lines.append(f"vllm:{name}{suffix}{{{base}{extra}}} {float(value)}")

        used = min(1.0, self.running / self.max_num_seqs)
        family("num_requests_running", "gauge", ("", "", self.running))
        family("num_requests_waiting", "gauge", ("", "", self.waiting))
        family(
            "num_requests_waiting_by_reason",
            "gauge",
            ("", 'reason="capacity"', self.waiting),
            ("", 'reason="deferred"', 0),
        )
        family("kv_cache_usage_perc", "gauge", ("", "", used))
        for name in ("prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total"):
            family(name, "counter", ("", "", 0))
        family("prompt_tokens_total", "counter", ("", "", self.prompt_tokens))
        family("generation_tokens_total", "counter", ("", "", self.generation_tokens))
        family(
            "request_success_total",
            "counter",
            *(("", f'finished_reason="{reason}"', count) for reason, count in self.finished.items()),
        )
        family(
            "iteration_tokens_total",
            "histogram",
            ("_bucket", 'le="+Inf"', self.iterations),
            ("_sum", "", self.prompt_tokens + self.generation_tokens),
            ("_count", "", self.iterations),
        )
        return "\n".join(lines) + "\n"
