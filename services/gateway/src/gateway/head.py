"""The head of one HTTP/1.1 request: llhttp's grammar (httptools) and what this gateway refuses beyond it.

A head is parsed whole, once its empty line has arrived, with a parser of its own (0.4 µs): nothing of one request can
leak into the next, and where the bytes were cut by the network cannot matter. llhttp in its strict mode already
refuses bare CR and LF, folded lines, control bytes, odd names, and every doubtful Content-Length or
Transfer-Encoding; it stays the only grammar, and no leniency of it is ever set.
"""

from __future__ import annotations

from urllib.parse import unquote

import httptools

HEAD_BYTES = 32_768  # request line and all fields; nginx's large_client_header_buffers are 4 x 8 KiB
HEADER_COUNT = 100
TARGET_BYTES = 8_192
MALFORMED = "Malformed HTTP request."
_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"))


class Refused(Exception):
    """Bytes that are not answered by the application: `status` and `message` for the caller."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head:
    """What one request line and its fields say.

    `length` is the body's Content-Length in bytes, or -1 for a chunked body. `headers` have lower-case names and
    values without surrounding blanks, in the order in which they came.
    """

    __slots__ = ("expects", "headers", "keep_alive", "length", "method", "path", "query", "raw_path", "url", "version")

    method: str
    version: str
    keep_alive: bool
    length: int
    expects: bool
    raw_path: bytes
    path: str
    query: bytes

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.url = b""

    # httptools' callbacks
    def on_url(self, url: bytes) -> None:
        """Keep the request target."""
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep one field. llhttp has stripped leading blanks but leaves trailing ones."""
        self.headers.append((name.lower(), value.strip()))


def parse_head(data: bytes) -> Head:
    """Parse `data`, which ends with the head's empty line. Raises `Refused`."""
    if not 65 <= data[0] <= 90:  # llhttp skips some bytes before a method; nothing but empty lines may stand there
        raise Refused(400, MALFORMED)
    head = Head()
    parser = httptools.HttpRequestParser(head)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer that a server may ignore (RFC 9110, 7.8): the request is answered as HTTP/1.1
    except httptools.HttpParserError:
        if data.startswith(b"PRI * HTTP/2.0\r\n"):
            raise Refused(505, "Only HTTP/1.1 is spoken here.") from None
        raise Refused(400, MALFORMED) from None
    headers = head.headers
    fields = dict(headers)
    head.version = parser.get_http_version()
    if head.version not in ("1.1", "1.0"):
        raise Refused(505, "Only HTTP/1.1 is spoken here.")
    if len(headers) > HEADER_COUNT:
        raise Refused(431, f"More than {HEADER_COUNT} header fields.")
    if len(fields) != len(headers):
        _check_repeated(headers, fields)
    method = parser.get_method()
    if method not in _METHODS:
        raise Refused(400, "This method is not known here.")
    head.method = method.decode("ascii")
    if head.version == "1.1" and b"host" not in fields:
        raise Refused(400, "The Host header is missing.")
    connection = fields.get(b"connection")
    head.keep_alive = head.version == "1.1"
    if connection is not None:
        options = connection.lower()
        if b"close" in options:
            head.keep_alive = False
        elif head.version == "1.0":
            head.keep_alive = b"keep-alive" in options
    _frame_body(head, fields)
    _split_target(head)
    return head


def _check_repeated(headers: list[tuple[bytes, bytes]], fields: dict[bytes, bytes]) -> None:
    """Fields that decide about framing, routing or identity may stand only once; `connection` is a list."""
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in seen and name in _SINGLE:
            raise Refused(400, f"The header '{name.decode('ascii')}' stands more than once.")
        seen.add(name)
    if b"connection" in fields:
        fields[b"connection"] = b",".join(value for name, value in headers if name == b"connection")


_SINGLE = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"expect"))


def _frame_body(head: Head, fields: dict[bytes, bytes]) -> None:
    coding = fields.get(b"transfer-encoding")
    if coding is None:
        head.length = int(fields.get(b"content-length") or b"0")  # llhttp: digits only, no overflow, only one
    elif coding.lower() != b"chunked" or head.version == "1.0":
        # llhttp would take `gzip, chunked`, and chunked in HTTP/1.0, where proxies disagree about the framing.
        raise Refused(501 if head.version == "1.1" else 400, "Only 'Transfer-Encoding: chunked' is understood.")
    else:
        head.length = -1
    head.expects = head.length != 0 and head.version == "1.1" and fields.get(b"expect", b"").lower() == b"100-continue"


def _split_target(head: Head) -> None:
    url = head.url
    if len(url) > TARGET_BYTES:
        raise Refused(414, f"The request target is longer than {TARGET_BYTES} bytes.")
    if url[:1] != b"/":
        if url[:7].lower() == b"http://" or url[:8].lower() == b"https://":
            # Absolute form: the path counts, the authority replaces Host (RFC 9112, 3.2.2) and routes nothing.
            authority, slash, rest = url.partition(b"//")[2].partition(b"/")
            head.headers = [(n, authority if n == b"host" else v) for n, v in head.headers]
            url = slash + rest or b"/"
        elif url != b"*" or head.method != "OPTIONS":
            raise Refused(400, "The request target must be a path.")
    raw, _, head.query = url.partition(b"?")
    head.raw_path = raw
    path = raw.decode("ascii")
    head.path = unquote(path) if "%" in path else path
