"""The answers' side of the dialects, without I/O: what to strip, where a stream ends, how a broken one ends.

A stream is relayed as bytes. Only whole events leave (`feed` keeps a rest until its blank line has come), so that an
event of ours can follow any relayed byte, and the terminal event is kept back until the call has been recorded.

The byte patterns below cannot be forged by generated text: inside a JSON string every quotation mark is escaped, so
`"usage":` only ever stands for the field. They allow the spaces that engines other than vLLM write, and lines that end
with CRLF are relayed as if they ended with LF. Patterns cost half of an event, so the event that nearly every other one
is like - one more token of the only choice - is known by a few fixed bytes instead (`_token`). An engine that reports
no running usage is counted by its deltas, a token each, until it says the true number. One that goes on after the limit
that it was given is cut at that limit.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import msgspec

from gateway import reported
from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.call import Usage
    from gateway.errors import GatewayError
    from gateway.wire import Request

HEAD = b"content-type: %b\r\nx-request-id: %b\r\nserver-timing: %b\r\n%b"  # … and the lines about limits
STREAM_HEAD = HEAD + b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
MAX_EVENT_BYTES = 4 * 1024 * 1024

_BEGIN = re.compile(rb'data: \{"id":[^\n]*?"choices":\[\{')
_DONE = re.compile(rb"(?:^|\n)(data: ?\[DONE\]\n\n)")
_USAGE_FIELD = re.compile(rb",\s*" + reported.FIELD)
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_FINGERPRINT = re.compile(rb',\s*"system_fingerprint"\s*:\s*(?:"[^"]*"|null)')
_INDEX = re.compile(rb'"index"\s*:\s*(\d+)')
_ERROR_EVENT = re.compile(rb'(?:^|\n\n)data: ?\{\s*"error"\s*:')
_NO_DATA = re.compile(rb"(?:(?:event|id|retry)?:[^\n]*\n)*\n")  # comments, and fields that carry nothing
_ENDS = {
    "messages": (b"event: message_stop\n",),
    "responses": (b"event: response.completed\n", b"event: response.incomplete\n"),
}
_SEQUENCE = re.compile(rb'"sequence_number"\s*:\s*(\d+)')
_RESPONSE_ID = re.compile(rb'"response"\s*:\s*\{\s*"id"\s*:\s*"([A-Za-z0-9_-]{1,128})"')


class Stream:
    """One SSE answer on its way through. `feed` returns what may be sent now; `ended` says that the rest (`tail`) is
    the dialect's terminal event. `tokens` is True once generated tokens have been seen (the role chunk has none).
    `limit`: the most tokens, prompt included, that this answer may cost (0: any number); `cut` says that it ended there
    while the engine was still sending."""

    __slots__ = (
        "_begin",
        "_by_index",
        "_last",
        "_limit",
        "_request",
        "_response_id",
        "_rest",
        "_sequence",
        "cut",
        "ended",
        "tail",
        "tokens",
        "usage",
    )

    def __init__(self, request: Request, usage: Usage, limit: int = 0) -> None:
        self._request = request
        self._limit = limit
        self._rest = b""
        self._begin = b""  # how the next event begins if it is one more token; empty: it has to be looked at
        self._last = b""  # an event that may turn out to be the last one
        self._by_index: dict[int, tuple[int, int]] = {}
        self._sequence = -1
        self._response_id = ""
        self.usage = usage
        self.cut = False
        self.ended = False
        self.tail = b""
        self.tokens = False

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they came. Raises `BrokenStream` where the engine itself reports that the stream broke, and
        `OwnBound`."""
        if self._rest:
            data = self._rest + data
        if self._begin and (ready := self._token(data)) is not None:
            self._rest = b""
            return ready
        if data.find(b"\r") >= 0:  # inside JSON it would be escaped
            data = data.replace(b"\r\n", b"\n")
        cut = data.rfind(b"\n\n") + 2
        if cut == 1:
            if len(data) > MAX_EVENT_BYTES:
                raise OwnBound("The engine sent an event that is longer than this service relays.")
            self._rest = data
            return b""
        if cut == len(data):
            self._rest = b""
        else:
            data, self._rest = data[:cut], data[cut:]
        if self.ended:
            return b""  # nothing follows the terminal event
        if data.find(b'"error"') >= 0 and (error := _ERROR_EVENT.search(data)):
            raise self._broken_at(data, error.start() + 2 if error.start() else 0)
        # An event ends like the JSON object in it. Only where one does not they are looked at one by one.
        if data.count(b"\n\n") != data.count(b"}\n\n"):
            self._check(data)
        dialect = self._request.endpoint.dialect
        if dialect == "openai":
            return self._openai(data)
        ready = self._messages(data) if dialect == "messages" else self._responses(data)
        if self._limit and self.usage.total > self._limit:
            self.usage.keep_to(self._limit)
            raise OwnBound("The engine went on after the limit of this answer.")
        return ready

    def _token(self, data: bytes) -> bytes | None:
        """One whole event that is one more token of an answer with one choice, and nothing else; None if it is not.

        What is looked for: one line, which begins like an event with a choice, does not end that choice, and ends with
        the running usage.
        """
        event, _, said = data.rpartition(b',"usage":')
        if (
            not event.startswith(self._begin)
            or event.find(b"\n") >= 0
            or event.find(b'"finish_reason":null') < 0
            or not said.endswith(b"}}\n\n")
            or not reported.note_running(self.usage, said[:-3])
        ):
            return None
        if self.usage.completion > 0:
            self.tokens = True
        ready = data if self._request.wants_running_usage else event + b"}\n\n"
        if self._limit and self.usage.prompt + self.usage.completion > self._limit:
            return self._stop(ready)
        return ready

    def _broken_at(self, data: bytes, at: int, what: str = "") -> BrokenStream:
        """The error for a stream that is broken from `at` on; what came before is passed on."""
        before = data[:at]
        if self._request.endpoint.dialect == "openai":
            before = self._openai_usage(before) + self._last
        return BrokenStream(before, what)

    def _check(self, data: bytes) -> None:
        """Raise `BrokenStream` at what is no event of a stream: half a JSON object, text of another kind, or an end
        that this dialect does not have before its own."""
        at = 0
        for event in _events(data):
            if event == b"data: [DONE]\n\n" or event == b"data:[DONE]\n\n":
                if self._request.endpoint.dialect == "openai" or self._ends_before(data, at):
                    return  # nothing follows the terminal event
                raise self._broken_at(data, at)
            if not (event.endswith(b"}\n\n") or _NO_DATA.fullmatch(event)):
                raise self._broken_at(data, at, "The engine sent something that is no event.")
            at += len(event)

    def _ends_before(self, data: bytes, at: int) -> bool:
        return any(mark in data[:at] for mark in _ENDS[self._request.endpoint.dialect])

    def _openai(self, data: bytes) -> bytes:
        """Whole events. Of several that came together those at the front may each be one more token."""
        ready: list[bytes] = []
        at = 0
        while self._begin and at < len(data):
            end = data.find(b"\n\n", at) + 2
            token = self._token(data[at:end])
            if token is None:
                break
            ready.append(token)
            at = end
        if at < len(data) and not self.ended:
            try:
                ready.append(self._look(data[at:]))
            except BrokenStream as broken:
                raise BrokenStream(b"".join(ready) + broken.before) from None
        return b"".join(ready)

    def _look(self, data: bytes) -> bytes:
        """Whole events that have to be looked at."""
        self._begin = b""
        if data.find(b"[DONE]\n\n") >= 0 and (done := _DONE.search(data)):
            self.ended = True
            self.tail = done[1]
            data = data[: done.start(1)]
        ready = self._openai_usage(data)
        if self._limit and self.usage.total > self._limit:
            return self._stop(ready)
        if self.ended and self._last:
            ready, self._last = ready + self._last, b""
        if self.ended or self._last:
            self._begin = b""
        return ready

    def _stop(self, ready: bytes) -> bytes:
        """End at the limit, as an engine that keeps it would: finish_reason "length", usage if asked for, [DONE].

        An event is a token, so as many of the last events as there are tokens too many are left out.
        """
        beyond = self.usage.total - self._limit
        self.usage.keep_to(self._limit)
        self.cut = self.ended = True
        self._begin = b""
        events = _events(self._last + ready)
        try:
            shape = msgspec.json.decode(events[-1].partition(b"data:")[2]) if events else {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            shape = {}
        shape = {name: shape[name] for name in ("id", "object", "created", "model") if name in shape}
        chat = self._request.endpoint.name == "chat_completions"
        said: dict[str, object] = {"delta": {}} if chat else {"text": ""}
        choices = [{"index": number, **said, "finish_reason": "length"} for number in range(max(1, self._request.n))]
        tail = b"data: " + msgspec.json.encode({**shape, "choices": choices}) + b"\n\n"
        if self._request.wants_usage:
            usage = self.usage
            told = {
                "prompt_tokens": usage.prompt,
                "completion_tokens": usage.completion,
                "total_tokens": usage.total,
            }
            tail += b"data: " + msgspec.json.encode({**shape, "choices": [], "usage": told}) + b"\n\n"
        self.tail = tail + b"data: [DONE]\n\n"
        return b"".join(events[:-beyond])

    def _openai_usage(self, data: bytes) -> bytes:
        said = reported.last(data)
        if said is None:
            if not self.usage.known:
                self._count(sum(map(reported.deltas, _events(data))))
            return data
        if self._request.n > 1:
            self._note_each(data)
        else:
            reported.note(self.usage, said)
            if begin := _BEGIN.match(data):
                self._begin = begin[0]
        if self.usage.completion > 0:
            self.tokens = True
        request = self._request
        if request.wants_running_usage:
            return data
        if not request.wants_usage and (self._last or _FINISHED.search(data) or _NO_CHOICES.search(data)):
            return self._without_usage(data)
        if not _NO_CHOICES.search(data):
            return _USAGE_FIELD.sub(b"", data)
        return b"".join(event if _NO_CHOICES.search(event) else _USAGE_FIELD.sub(b"", event) for event in _events(data))

    def _without_usage(self, data: bytes) -> bytes:
        """Cut out usage and the last event, which exists for it alone.

        The engine writes its fingerprint on the very last event: that would have been the one before.
        """
        ready = []
        for event in _events(data):
            if _NO_CHOICES.search(event):
                if self._last and (mark := _FINGERPRINT.search(event)):
                    self._last = self._last[: -len(b"}\n\n")] + mark[0] + b"}\n\n"
                continue
            ready.append(self._last)
            event = _USAGE_FIELD.sub(b"", event)
            self._last = event if _FINISHED.search(event) else b""
            if not self._last:
                ready.append(event)
        return b"".join(ready)

    def _note_each(self, data: bytes) -> None:
        """Several choices: each chunk's usage counts its own choice (and its own prompt); the last event's counts all.

        Choices are numbered prompt by prompt.
        """
        a_prompt = max(1, self._request.n // self._request.prompts)
        for event in _events(data):
            said = reported.last(event)
            if said is None:
                continue
            if _NO_CHOICES.search(event):
                reported.note(self.usage, said)
            elif index := _INDEX.search(event):
                self._by_index[int(index[1])] = (said.prompt_tokens or 0, said.completion_tokens or 0)
                prompts = {number // a_prompt: prompt for number, (prompt, _) in self._by_index.items()}
                self.usage.prompt = sum(prompts.values())
                self.usage.completion = sum(completion for _, completion in self._by_index.values())
                self.usage.known = True

    def _messages(self, data: bytes) -> bytes:
        # Between message_start and message_delta the engine counts nothing aloud: a delta is at least one token.
        if b'"usage"' not in data and b"event: error" not in data:
            self._count(data.count(b"event: content_block_delta"))
            return self._end_at(data, _ENDS["messages"])
        for event in _events(data):
            if event.startswith(b"event: error"):
                raise BrokenStream(data[: data.index(event)])
            if event.startswith((b"event: message_start", b"event: message_delta")):
                reported.note_event(self.usage, event)
            elif event.startswith(b"event: content_block_delta"):
                self._count(1)
        return self._end_at(data, _ENDS["messages"])

    def _count(self, deltas: int) -> None:
        if deltas:
            self.tokens = True
            self.usage.completion += deltas

    def _responses(self, data: bytes) -> bytes:
        self._count(data.count(b".delta\ndata:"))
        if not self._response_id and (found := _RESPONSE_ID.search(data)):
            self._response_id = found[1].decode()
        if sequences := _SEQUENCE.findall(data):
            self._sequence = int(sequences[-1])
        for event in _events(data):
            if event.startswith((b"event: response.failed", b"event: error")):
                raise BrokenStream(data[: data.index(event)])
            if event.startswith((b"event: response.completed", b"event: response.incomplete")):
                reported.note_event(self.usage, event)
        return self._end_at(data, _ENDS["responses"])

    def _end_at(self, data: bytes, marks: tuple[bytes, ...]) -> bytes:
        for mark in marks:
            at = 0 if data.startswith(mark) else data.find(b"\n\n" + mark) + 2
            if at != 1:
                self.ended = True
                self.tail = data[at:]
                return data[:at]
        return data

    def broken(self, error: GatewayError, request_id: str) -> bytes:
        """The one event that tells the client, in its dialect, that this stream did not end well."""
        dialect = self._request.endpoint.dialect
        if dialect == "messages":
            return b"event: error\ndata: " + error_body(error, dialect) + b"\n\n"
        if dialect == "responses":
            failed = {
                "type": "response.failed",
                "sequence_number": self._sequence + 1,
                "response": {
                    "id": self._response_id or f"resp_{request_id}",
                    "object": "response",
                    "created_at": int(time.time()),
                    "status": "failed",
                    "model": self._request.model,
                    "output": [],
                    "error": {"code": "server_error", "message": error.message},
                },
            }
            return b"event: response.failed\ndata: " + msgspec.json.encode(failed) + b"\n\n"
        return b"data: " + error_body(error, dialect) + b"\n\n"


class OwnBound(UpstreamError):
    """A bound of ours ended the answer. One caller's request can do that to a sound engine: it is no failure of it."""


class BrokenStream(UpstreamError):
    """The engine reported a failure inside the stream, or broke its form; `before` are the whole events before that."""

    def __init__(self, before: bytes, message: str = "") -> None:
        super().__init__(message or "The engine failed while it was answering.")
        self.before = before


def error_body(error: GatewayError, dialect: str) -> bytes:
    """The error as a JSON body; Anthropic's envelope around the same object where that dialect is spoken."""
    body = error.body()
    if dialect == "messages":
        body = {"type": "error", **body}
    return msgspec.json.encode(body)


def _events(data: bytes) -> list[bytes]:
    """Whole events with their blank lines."""
    return [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
