"""Multipart bodies (transcriptions): which model, streamed or not. The engine gets a form that is written here.

Two parsers read odd forms in two ways, and then what was checked is not what is computed. So the form is taken apart
strictly, and put together again with a boundary and heads of our own; only what fields and files contain is the
caller's.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from werkzeug.http import parse_options_header

from gateway.errors import InvalidRequest
from gateway.wire import STRIPPED, Caps, Endpoint, Request

_VALUE = r"""(?:"[^"\\\x00-\x1f]*"|[^\s";,\\]+)"""
_PARAMETER = re.compile(rf"[ \t]*;[ \t]*([\w!#$%&'*+.^`|~-]+)=({_VALUE})", re.ASCII)
_CONTENT_TYPE = re.compile(rf"multipart/form-data(?:{_PARAMETER.pattern})+[ \t]*;?[ \t]*", re.ASCII | re.IGNORECASE)
_BOUNDARY = re.compile(r"[\w'()+,./:=?-]{1,70}", re.ASCII)
_HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_NAME = re.compile(r"[\w.\[\]-]{1,100}", re.ASCII)
_MEDIA_TYPE = re.compile(rb"[\w.+-]{1,100}/[\w.+-]{1,100}", re.ASCII)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f"\\]')
_COUNT = re.compile(rb"[0-9]{1,9}")
MAX_PARTS = 64
MAX_FIELD_BYTES = 65_536
MAX_HEAD_BYTES = 4_096
SEARCH_BYTES = 1_048_576  # searched in one go
_SECRET = secrets.token_bytes(32)
_TRUE = (b"true", b"1", b"on", b"yes", b"t", b"y")  # as vLLM reads it


class Form(Request):
    """A request that is a form; `content_type` belongs to the bytes in `raw`."""

    __slots__ = ("content_type",)

    def __init__(self, endpoint: Endpoint, raw: bytes, model: str, content_type: str) -> None:
        super().__init__(endpoint, raw, model)
        self.content_type = content_type


def parse(endpoint: Endpoint, raw: bytes, content_type: str, caps: Caps) -> Form:
    """Read the form's small fields, and write it anew. Raises `InvalidRequest`."""
    fields: dict[str, bytes] = {}
    parts = [(*_read_head(head), content) for head, content in _parts(raw, _boundary_of(content_type))]
    # Nobody can know it and write it into a file; the same form has the same one when it comes again.
    boundary = hashlib.blake2b(repr([bytes(part[3][:64]) for part in parts]).encode(), key=_SECRET).hexdigest()[:32]
    written: list[bytes | memoryview] = []
    for name, filename, kind, content in parts:
        described = f'\r\n--{boundary}\r\ncontent-disposition: form-data; name="{name}"'
        if name in fields and not name.endswith("[]"):
            raise InvalidRequest(f"'{name}' stands twice.", param=name)
        if (filename is None) == (name == "file"):
            raise InvalidRequest("'file' is a file, and nothing else is one.", param=name)
        if filename is None:
            if len(content) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"'{name}' is too long.", param=name)
            fields[name] = bytes(content)
        else:
            fields[name] = b""
            described += f'; filename="{_UNSAFE.sub("_", filename)}"\r\ncontent-type: {kind}'
        written += [f"{described}\r\n\r\n".encode("utf-8", "replace"), content]
    for name in STRIPPED:
        if name in fields:
            raise InvalidRequest(f"'{name}' is not accepted.", param=name)
    model = fields.get("model", b"").decode("utf-8", "replace")
    if not model:
        raise InvalidRequest("'model' is missing.", param="model")
    if "file" not in fields:
        raise InvalidRequest("'file' is missing.", param="file")
    if (n := fields.get("n")) is not None and (_COUNT.fullmatch(n) is None or not 1 <= int(n) <= caps.n):
        raise InvalidRequest(f"'n' must be between 1 and {caps.n}.", param="n")
    written[0] = written[0][2:]
    form = b"".join([*written, f"\r\n--{boundary}--\r\n".encode()])
    request = Form(endpoint, form, model, f"multipart/form-data; boundary={boundary}")
    request.stream = fields.get("stream", b"").lower() in _TRUE
    request.wants_usage = fields.get("stream_include_usage", b"").lower() in _TRUE
    request.wants_running_usage = request.wants_usage
    request.media = 1
    text = sum(len(value) for value in fields.values())
    request.prompt_bound = request.prompt_estimate = text + caps.media_tokens
    return request


def _boundary_of(content_type: str) -> bytes:
    """The one boundary that a content type names. Raises `InvalidRequest`."""
    boundaries: list[str] = []
    if _CONTENT_TYPE.fullmatch(content_type):
        boundaries = [
            value.strip('"') for name, value in _PARAMETER.findall(content_type) if name.lower() == "boundary"
        ]
    if len(boundaries) != 1 or _BOUNDARY.fullmatch(boundaries[0]) is None:
        raise InvalidRequest("The body must be multipart/form-data, with one boundary.")
    return boundaries[0].encode("ascii")


def _parts(raw: bytes, boundary: bytes) -> list[tuple[bytes, memoryview]]:
    """The head and the content of each part: nothing before the first one, nothing of doubt between them."""
    unreadable = InvalidRequest("The multipart body cannot be read.")
    delimiter = b"\r\n--" + boundary
    view = memoryview(raw)
    parts: list[tuple[bytes, memoryview]] = []
    at = len(delimiter) - 2
    if raw[:at] != delimiter[2:]:
        raise unreadable
    while raw[at : at + 2] == b"\r\n":
        begin = raw.find(b"\r\n\r\n", at, at + MAX_HEAD_BYTES) + 4
        end = _find(raw, delimiter, begin)
        if begin < 4 or end == len(raw) or len(parts) == MAX_PARTS:
            raise unreadable
        parts.append((raw[at + 2 : begin - 4], view[begin:end]))
        at = end + len(delimiter)
    if raw[at : at + 2] != b"--":
        raise unreadable
    return parts


def _read_head(head: bytes) -> tuple[str, str | None, str]:
    """A part's name, its file's name (None: it is a field) and its media type. Raises `InvalidRequest`."""
    described: list[bytes] = []
    kind = "application/octet-stream"
    for line in head.split(b"\r\n"):
        header = _HEADER.fullmatch(line)
        if header is None:
            raise InvalidRequest("A part's head in the multipart body cannot be read.")
        title = header[1].lower()
        if title == b"content-disposition":
            described.append(header[2])
        elif title == b"content-type" and _MEDIA_TYPE.fullmatch(header[2]):
            kind = header[2].decode("ascii")
        elif title == b"content-transfer-encoding" and header[2].lower() not in (b"binary", b"8bit", b"7bit"):
            raise InvalidRequest("A part of the multipart body is encoded.")
    if len(described) != 1:
        raise InvalidRequest("A part of the multipart body has no name.")
    form, options = parse_options_header(described[0].decode("utf-8", "replace"))
    name = options.get("name", "")
    if form != "form-data" or _NAME.fullmatch(name) is None:
        raise InvalidRequest("A part of the multipart body has no name that can be a field's.")
    return name, options.get("filename"), kind


def _find(raw: bytes, delimiter: bytes, start: int) -> int:
    """Where `delimiter` stands next; the end if it does not. Others have their turn every `SEARCH_BYTES`."""
    while start < len(raw):
        found = raw.find(delimiter, start, start + SEARCH_BYTES + len(delimiter) - 1)
        if found >= 0:
            return found
        start += SEARCH_BYTES
    return len(raw)
