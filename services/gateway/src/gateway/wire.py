"""The dialects, without I/O: which routes exist, what a request asks for, what its bytes become for the engine.

Requests are parsed only as far as needed: top-level fields stay raw bytes (`msgspec.Raw`), and the body that goes to
the engine is built from them, so unknown fields travel untouched and a key that stands twice stands once.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.call import Priority
from gateway.errors import InvalidRequest
from gateway.media import media_in
from gateway.pairs import repeated

if TYPE_CHECKING:
    from gateway.large_body import Aside, Buffer

Raw = msgspec.Raw


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One relayed route. `name` is a metric label and ledger value; `upstream` is vLLM's path.

    `output_field` is the field that bounds the output (None: the endpoint generates nothing). `pairs`: each prompt is a
    query and a document.
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
    pairs: bool = False


ENDPOINTS: dict[str, Endpoint] = {
    e.path: e
    for e in (
        Endpoint("chat_completions", "/v1/chat/completions", "/v1/chat/completions", "openai",
                 "max_completion_tokens", streams=True),
        Endpoint("completions", "/v1/completions", "/v1/completions", "openai", "max_tokens", 16, streams=True),
        Endpoint("embeddings", "/v1/embeddings", "/v1/embeddings", "openai"),
        Endpoint("rerank", "/v1/rerank", "/v1/rerank", "openai", pairs=True),
        Endpoint("score", "/v1/score", "/v1/score", "openai", pairs=True),
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
        "affinity", "aside", "body_bytes", "endpoint", "fields", "max_output", "media", "model", "n", "output_limit",
        "priority", "prompt_bound", "prompt_estimate", "prompts", "raw", "stream", "wants_running_usage", "wants_usage",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, raw: bytes, model: str) -> None:
        self.endpoint = endpoint
        self.raw = raw
        self.aside: Aside | None = None  # of a large body: what was not parsed; `fields` have placeholders for it
        self.body_bytes = len(raw)
        self.model = model  # as the caller named it
        self.fields: dict[str, Raw] = {}
        self.stream = False
        self.wants_usage = False  # the caller asked for the final usage chunk
        self.wants_running_usage = False  # … for usage on every chunk
        self.n = 1  # sequences generated: n (or best_of) times prompts
        self.prompts = 1
        self.media = 0
        self.max_output: int | None = None
        self.output_limit: int | None = None
        self.prompt_bound = 0
        self.prompt_estimate = 0
        self.priority: Priority | None = None
        self.affinity: int | None = None  # same conversation, same number

    @property
    def parsed_bytes(self) -> int:
        """The bytes of the body less what was set aside."""
        return self.body_bytes if self.aside is None else len(self.aside.rest)

    @property
    def choices(self) -> int:
        """Sequences generated for each prompt; the engine computes, and counts, the prompt once for each."""
        return self.n // self.prompts or 1

    @property
    def output_tokens(self) -> int | None:
        """Most tokens that the call can generate over all choices; None while nothing bounds it."""
        if self.endpoint.output_field is None:
            return 0
        limit = self.output_limit if self.output_limit is not None else self.max_output
        return None if limit is None else limit * self.n


# What vLLM would obey and no caller may say: scheduling, transfer between engines, internal identifiers.
STRIPPED = frozenset(
    ("priority", "request_id", "kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "vllm_xargs",
     "bootstrap_host", "bootstrap_port", "bootstrap_room", "data_parallel_rank")
)  # fmt: skip

# Prompt tokens are never more than the text's bytes (byte-level and byte-fallback tokenizers) plus what a chat
# template adds by itself: a default system prompt and the marks of one message, which each engine is asked for
# (`prompt_count`); the marks of further messages are shorter than their JSON. For tools also instructions and
# indenting.
TOOL_TEMPLATE_TOKENS = 512
FIRST_MESSAGE_BYTES = 24  # the JSON around the first message, whose marks are counted with the template
# Fields of whose bytes nothing reaches the prompt.
NOT_PROMPT = frozenset(
    ("model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens", "temperature",
     "top_p", "top_k", "min_p", "n", "best_of", "seed", "stop", "user", "logprobs", "top_logprobs", "presence_penalty",
     "frequency_penalty", "repetition_penalty", "ignore_eos", "min_tokens", "store", "metadata", "service_tier",
     "encoding_format", "echo")
)  # fmt: skip
LARGE_BYTES = 1_048_576  # what is larger may not be parsed or built in one go (large_body.py)
BYTES_PER_TOKEN = 4  # a usual text; only for estimates


@dataclass(frozen=True, slots=True)
class Caps:
    """What one request may ask for; see the settings of the same names."""

    n: int = 8
    logprobs: int = 20
    output_tokens: int = 0
    prompts: int = 256
    inputs: int = 2048
    media: int = 16
    media_tokens: int = 4096
    remote_media: bool = False


class Head(msgspec.Struct):
    """The fields that the gateway itself looks at; everything else stays unread."""

    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    logprobs: int | bool | None = None
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    stream_options: dict[str, Any] | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    echo: Any = None


_INTEGERS = ("n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens", "logprobs", "top_logprobs",
             "prompt_logprobs")  # fmt: skip
_head = msgspec.json.Decoder(Head)
_FLOAT = re.compile(rb"-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?")
_fields = msgspec.json.Decoder(dict[str, Raw])
_items = msgspec.json.Decoder(list[Raw])


def parse(endpoint: Endpoint, raw: bytes, caps: Caps, aside: Aside | None = None) -> Request:
    """Check a JSON body and say what it asks for. Raises `InvalidRequest` with the parameter's name.

    Of a large body `aside` holds what need not be parsed.
    """
    text = raw if aside is None else aside.rest
    try:
        fields = _fields.decode(text)
        try:
            head = _head.decode(text)
        except msgspec.ValidationError:
            if not _mend_integers(fields):
                raise
            head = _head.decode(msgspec.json.encode(fields))
    except msgspec.ValidationError as error:
        param = str(error).rpartition("$.")[2].rstrip("`") if "$." in str(error) else None
        what = f"'{param}' has the wrong type." if param else "The body must be one JSON object."
        raise InvalidRequest(what, param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body is not valid JSON.") from None
    if not head.model:
        raise InvalidRequest("'model' is missing.", param="model")
    request = Request(endpoint, raw, head.model)
    request.fields = fields
    request.aside = aside
    request.stream = endpoint.streams and head.stream is True
    if endpoint.output_field is not None:
        _read_output(request, head, caps)
    if endpoint.name == "responses":
        _refuse_stored_responses(head)
    request.prompts = _count_prompts(endpoint, fields, caps)
    request.n *= request.prompts if endpoint.name == "completions" else 1
    length = len if aside is None else aside.characters
    media, media_bytes = media_in(text, fields, caps.remote_media, length, endpoint.name)
    if media > caps.media:
        raise InvalidRequest(f"At most {caps.media} images, audios or videos are accepted in one call.")
    request.media = media
    text_bytes = request.body_bytes - media_bytes
    for name, value in fields.items():
        if name in NOT_PROMPT:
            text_bytes -= len(name) + (len(memoryview(value)) if aside is None else aside.size(value))
    if "messages" in fields:
        text_bytes -= FIRST_MESSAGE_BYTES
    if text_bytes < 0:
        text_bytes = 0
    extra = 0
    if (tools := fields.get("tools")) is not None:
        extra = (len(memoryview(tools)) if aside is None else aside.size(tools)) + TOOL_TEMPLATE_TOKENS
    request.prompt_bound = text_bytes + extra + media * caps.media_tokens
    request.prompt_estimate = (text_bytes // BYTES_PER_TOKEN or 1) + media * caps.media_tokens
    if endpoint.pairs:
        _read_pairs(request, caps)
    conversation = fields.get("messages") or fields.get("input") or fields.get("prompt")
    if conversation is not None:
        # A conversation grows at its end: its beginning tells it from others and finds the engine with its cache.
        view = memoryview(conversation)
        request.affinity = zlib.crc32(view[:2048] if aside is None else aside.beginning(view, 2048))
    return request


def _read_pairs(request: Request, caps: Caps) -> None:
    fields = {name: value for name, value in request.fields.items() if name not in NOT_PROMPT}
    aside = request.aside
    if aside is None:
        octets, media = repeated(fields, lambda value: len(memoryview(value)), caps.remote_media, len)
    else:
        octets, media = repeated(fields, aside.size, caps.remote_media, aside.characters)
    more = request.prompts - 1
    # Once more than that: some models read the query before the documents and behind them.
    request.prompt_bound += request.prompts * octets + more * media * caps.media_tokens
    request.prompt_estimate += more * (octets // BYTES_PER_TOKEN + media * caps.media_tokens)


def _mend_integers(fields: dict[str, Raw]) -> bool:
    """Write `100.0`, which vLLM takes for an integer, as one; whether there was any."""
    mended = False
    for name in _INTEGERS:
        value = bytes(memoryview(fields.get(name, b"")))
        if _FLOAT.fullmatch(value) and (number := float(value)).is_integer() and abs(number) < 1e15:
            fields[name] = Raw(b"%d" % int(number))
            mended = True
    return mended


def _read_output(request: Request, head: Head, caps: Caps) -> None:
    endpoint = request.endpoint
    name = endpoint.output_field or ""
    wanted: int | None = getattr(head, name)
    if wanted is None and endpoint.name == "chat_completions":
        wanted = head.max_tokens
        if wanted is not None:
            name = "max_tokens"  # as the caller calls it
    if wanted == 0 and endpoint.name == "completions" and head.echo is True:
        wanted = 1  # the prompt alone comes back, and the engine computes a token all the same
    if wanted is not None and wanted < 1:
        raise InvalidRequest(f"'{name}' must be at least 1.", param=name)
    request.max_output = wanted if wanted is not None else endpoint.default_output
    if caps.output_tokens and (request.max_output is None or request.max_output > caps.output_tokens):
        request.output_limit = caps.output_tokens
    if head.n is not None or head.best_of is not None:
        for name, value in (("n", head.n), ("best_of", head.best_of)):
            if value is not None:
                if not 1 <= value <= caps.n:
                    raise InvalidRequest(f"'{name}' must be between 1 and {caps.n}.", param=name)
                request.n = max(request.n, value)
    if head.logprobs is not None or head.top_logprobs is not None or head.prompt_logprobs is not None:
        for name, asked in (
            ("logprobs", head.logprobs),
            ("top_logprobs", head.top_logprobs),
            ("prompt_logprobs", head.prompt_logprobs),
        ):
            if asked is not None and int(asked) > caps.logprobs:
                raise InvalidRequest(f"'{name}' must be at most {caps.logprobs}.", param=name)
    if request.stream and head.stream_options:
        request.wants_usage = bool(head.stream_options.get("include_usage"))
        request.wants_running_usage = request.wants_usage and bool(head.stream_options.get("continuous_usage_stats"))


def _refuse_stored_responses(head: Head) -> None:
    # Answers kept inside the engine would outlive the call, escape the ledger and be readable by other keys.
    if head.background:
        raise InvalidRequest("'background' is not offered: answers are not stored.", param="background")
    if head.previous_response_id:
        raise InvalidRequest(
            "'previous_response_id' is not offered: answers are not stored; send the conversation in 'input'.",
            param="previous_response_id",
        )


# Lists that are no prompts. Every other one is counted, so that a new field is no way around the bound.
_NO_BATCHES = frozenset(("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logprob_token_ids", "tools"))


def _count_prompts(endpoint: Endpoint, fields: dict[str, Raw], caps: Caps) -> int:
    count = 1
    most = caps.inputs if endpoint.name == "embeddings" else caps.prompts
    if endpoint.name in ("chat_completions", "responses", "messages", "tokenize"):
        return count
    for name, raw in fields.items():
        if bytes(memoryview(raw)[:1]) != b"[" or name in _NO_BATCHES:
            continue
        items = _items.decode(raw)
        if not items or memoryview(items[0])[0] in b"-0123456789":
            continue  # one prompt as token numbers
        if name == "messages" and memoryview(items[0])[0] == 0x7B:
            continue  # one conversation; several are lists in a list
        if len(items) > most:
            raise InvalidRequest(f"'{name}' may have at most {most} entries.", param=name)
        count = max(count, len(items))
    return count


def payload(request: Request, served_model: str) -> bytes | list[Buffer]:
    """The body for the engine: the caller's fields less `STRIPPED`, with the served model's name, the output limit that
    the budget decided, and running usage asked for on every stream. In pieces where some of it was set aside."""
    fields = {name: value for name, value in request.fields.items() if name not in STRIPPED}
    if served_model != request.model:
        fields["model"] = _encode(served_model)
    endpoint = request.endpoint
    if request.output_limit is not None and endpoint.output_field is not None:
        name = endpoint.output_field
        if endpoint.name == "chat_completions" and name not in fields and "max_tokens" in fields:
            name = "max_tokens"
        fields[name] = _encode(request.output_limit)
    if request.stream and endpoint.dialect == "openai":
        asked = fields.get("stream_options")
        if asked is None or bytes(memoryview(asked)) in (b"{}", b"null"):
            fields["stream_options"] = _USAGE_OPTIONS
        else:
            options = _fields.decode(asked)
            options["include_usage"] = options["continuous_usage_stats"] = Raw(b"true")
            fields["stream_options"] = _encode(options)
    if endpoint.name == "responses":
        fields["store"] = Raw(b"false")
    encoded = msgspec.json.encode(fields)
    return encoded if request.aside is None else request.aside.restore(encoded)


_USAGE_OPTIONS = Raw(b'{"include_usage":true,"continuous_usage_stats":true}')


def _encode(value: Any) -> Raw:
    return Raw(msgspec.json.encode(value))
