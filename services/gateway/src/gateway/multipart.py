"""Multipart bodies (transcriptions): which model, streamed or not. The bytes travel untouched."""

from __future__ import annotations

import re

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from gateway.errors import InvalidRequest
from gateway.wire import Caps, Endpoint, Request

_BOUNDARY = re.compile(r'boundary="?([^";,]{1,70})"?', re.IGNORECASE)
MAX_PARTS = 64
MAX_FIELD_BYTES = 65_536
SEARCH_BYTES = 1_048_576  # searched in one go
REFUSED = ("priority", "request_id", "vllm_xargs", "kv_transfer_params")  # these bytes cannot be stripped cheaply


def parse(endpoint: Endpoint, raw: bytes, content_type: str, caps: Caps) -> Request:
    """Read the form's small fields. Raises `InvalidRequest`."""
    found = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or found is None:
        raise InvalidRequest("The body must be multipart/form-data.")
    fields, files = _read(raw, found[1].encode("latin-1"))
    for name in REFUSED:
        if name in fields:
            raise InvalidRequest(f"'{name}' is not accepted.", param=name)
    model = fields.get("model", b"").decode("utf-8", "replace")
    if not model:
        raise InvalidRequest("'model' is missing.", param="model")
    if not files:
        raise InvalidRequest("'file' is missing.", param="file")
    request = Request(endpoint, raw, model)
    request.stream = fields.get("stream", b"").lower() in (b"true", b"1")
    request.wants_usage = fields.get("stream_include_usage", b"").lower() in (b"true", b"1")
    request.wants_running_usage = request.wants_usage
    request.media = 1
    text = sum(len(value) for value in fields.values())
    request.prompt_bound = request.prompt_estimate = text + caps.media_tokens
    return request


def _read(raw: bytes, boundary: bytes) -> tuple[dict[str, bytes], int]:
    decoder = MultipartDecoder(boundary, max_form_memory_size=len(raw) + 1, max_parts=MAX_PARTS)
    fields: dict[str, bytes] = {}
    files = 0
    current: str | None = None
    try:
        decoder.receive_data(_shortened(raw, b"--" + boundary))
        decoder.receive_data(None)
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, File):
                files, current = files + 1, None
            elif isinstance(event, Field):
                current = event.name
                fields[current] = b""
            elif isinstance(event, Data) and current is not None:
                fields[current] += event.data
                if len(fields[current]) > MAX_FIELD_BYTES:
                    raise InvalidRequest(f"'{current}' is too long.", param=current)
    except (ValueError, RequestEntityTooLarge):
        raise InvalidRequest("The multipart body cannot be read.") from None
    return fields, files


def _shortened(raw: bytes, delimiter: bytes, keep: int = MAX_FIELD_BYTES + 1) -> bytes:
    """The form without the middle of its long parts: what is read of them is their head and that they are long.

    The decoder copies and searches all that it is given, holding Python's lock. Here only the delimiter is searched,
    with a pause for others every `SEARCH_BYTES`.
    """
    pieces = []
    begin = 0
    for _ in range(MAX_PARTS + 2):
        end = _find(raw, delimiter, begin + 1)
        if end - begin > 2 * keep and b"\r\n\r\n" in raw[begin : begin + keep]:
            pieces += [raw[begin : begin + keep], raw[end - keep : end]]
        else:
            pieces.append(raw[begin:end])
        begin = end
    return b"".join([*pieces, raw[begin:]])


def _find(raw: bytes, delimiter: bytes, start: int) -> int:
    """Where `delimiter` stands next; the end if it does not."""
    while start < len(raw):
        found = raw.find(delimiter, start, start + SEARCH_BYTES + len(delimiter) - 1)
        if found >= 0:
            return found
        start += SEARCH_BYTES
    return len(raw)
