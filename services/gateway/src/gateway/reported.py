"""What an engine says that an answer cost, and what shows that it generated something. No I/O.

Three dialects, one noun: `note` brings what was said into a `Usage`. Whatever an engine writes that is no usage
(numbers as text, another shape) says nothing; it never fails a call.
"""

from __future__ import annotations

import re

import msgspec

from gateway.call import Usage

FIELD = rb'"usage"\s*:\s*\{(?:[^{}]|\{[^{}]*\})*\}'
_USAGE = re.compile(rb'"usage"\s*:\s*(\{(?:[^{}]|\{[^{}]*\})*\})')


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class Said(msgspec.Struct):
    """The union of the dialects' usage objects."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None  # Messages: beside input_tokens, which leaves out what the cache had
    cache_creation_input_tokens: int | None = None
    seconds: float | None = None  # transcriptions report the length of the audio


class _Message(msgspec.Struct):
    usage: Said | None = None


class _Body(msgspec.Struct):
    """A JSON answer, or the data of one event, as far as it concerns usage."""

    usage: Said | None = None
    message: _Message | None = None  # message_start
    response: _Message | None = None  # response.completed


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Chunk(msgspec.Struct):
    """An event of an OpenAI stream, as far as it shows that tokens were generated."""

    choices: list[_Choice] = []


_LONGEST_USAGE = 4096  # bytes
_chunk = msgspec.json.Decoder(_Chunk)
_usage = msgspec.json.Decoder(Said)
_body = msgspec.json.Decoder(_Body)

# Whisper-style encoders make 50 positions of a second of audio; the engine reports seconds instead of tokens.
AUDIO_TOKENS_PER_SECOND = 50


def note(usage: Usage, said: Said) -> None:
    """Take over what the engine said; a field that it left out keeps its value, and without any it said nothing."""
    prompt = said.prompt_tokens
    if prompt is None and said.input_tokens is not None:
        prompt = said.input_tokens + (said.cache_read_input_tokens or 0) + (said.cache_creation_input_tokens or 0)
    completion = said.completion_tokens if said.completion_tokens is not None else said.output_tokens
    if prompt is None and said.total_tokens is not None:
        prompt = said.total_tokens - (completion or 0)
    if prompt is None and said.seconds is not None:
        prompt = round(said.seconds * AUDIO_TOKENS_PER_SECOND)
    if prompt is not None:
        usage.prompt = prompt
    if completion is not None:
        usage.completion = completion
    details = said.prompt_tokens_details or said.input_tokens_details
    if details is not None and details.cached_tokens is not None:
        usage.cached = details.cached_tokens
    elif said.cache_read_input_tokens is not None:
        usage.cached = said.cache_read_input_tokens
    if prompt is not None or completion is not None:
        usage.known = True


def note_running(usage: Usage, text: bytes) -> bool:
    """Take over one usage object as vLLM writes it on every event. False: it is another one, nothing was noted."""
    try:
        said = _usage.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if said.prompt_tokens is None or said.completion_tokens is None:
        return False
    usage.prompt = said.prompt_tokens
    usage.completion = said.completion_tokens
    if (details := said.prompt_tokens_details) is not None and details.cached_tokens is not None:
        usage.cached = details.cached_tokens
    usage.known = True
    return True


def note_body(usage: Usage, body: bytes) -> bool:
    """Read the usage of a whole JSON answer. Returns False if the body is no JSON at all."""
    try:
        said = _body.decode(body).usage
    except msgspec.ValidationError:
        return True  # JSON of another shape; it says nothing about usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if said is not None:
        note(usage, said)
    return True


class Search:
    """Looks for the usage of a JSON answer that is too large to keep, in its pieces as they come.

    It may stand anywhere: vLLM writes it before a chat's `prompt_logprobs` and before the results of a rerank. A text
    cannot imitate the field, but an object that a caller sent and the engine repeats can have one of that name: the
    largest counts, so that nobody pays less by it.
    """

    __slots__ = ("_end", "_usage")

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._end = b""  # where a field may have begun that the next piece ends

    def look(self, piece: bytes) -> None:
        """Take the next piece."""
        data = self._end + piece
        at = data.find(b'"usage"')
        while at >= 0:
            if found := _USAGE.match(data, at):
                self._take(found[1])
            at = data.find(b'"usage"', at + 7)
        self._end = data[-_LONGEST_USAGE:]

    def _take(self, text: bytes) -> None:
        try:
            said = _usage.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        found, usage = Usage(), self._usage
        note(found, said)
        if found.known and (not usage.known or found.total > usage.total):
            usage.prompt, usage.completion, usage.cached, usage.known = (
                found.prompt,
                found.completion,
                found.cached,
                True,
            )


def note_event(usage: Usage, event: bytes) -> None:
    """Read the usage of one event of the Messages or the Responses dialect."""
    try:
        body = _body.decode(event.partition(b"data:")[2])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for part in (body, body.message, body.response):
        if part is not None and part.usage is not None:
            note(usage, part.usage)


def last(data: bytes) -> Said | None:
    """The usage that stands last in `data`."""
    end = len(data)
    while (at := data.rfind(b'"usage"', 0, end)) >= 0:  # the last one is nearly always the field
        if found := _USAGE.match(data, at):
            try:
                return _usage.decode(found[1])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return None
        end = at
    return None


def deltas(event: bytes) -> int:
    """How many choices of one event of an OpenAI stream have something new."""
    try:
        choices = _chunk.decode(event.partition(b"data:")[2]).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    new = 0
    for choice in choices:
        said = choice.delta or _Delta()
        new += bool(choice.text or said.content or said.reasoning_content or said.reasoning or said.tool_calls)
    return new
