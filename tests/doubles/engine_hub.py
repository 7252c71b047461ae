"""A model hub on 127.0.0.1: the two routes that a download needs, with ranges, and faults that a test asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` as the model `name`. Set `stall_after` to stop answering after so many bytes of a big file."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.commit = COMMIT
        self.gated = False
        self.damaged: set[str] = set()  # files that arrive with another content of the same length
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.ranges: list[int] = []  # where downloads of big files began
        self._over = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Quiet."""

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, call: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = call.path.partition("?")[0]
        if path.startswith(f"/api/models/{self.name}"):
            self._tell(call)
        elif found := re.fullmatch(rf"/{re.escape(self.name)}/resolve/{self.commit}/(.+)", path):
            self._send(call, found[1], with_body)
        else:
            self._refuse(call, 404, "RepoNotFound")

    def _tell(self, call: BaseHTTPRequestHandler) -> None:
        if self.gated:
            self._refuse(call, 403, "GatedRepo")
            return
        siblings = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"id": self.name, "modelId": self.name, "sha": self.commit, "siblings": siblings}).encode()
        self._head(call, 200, len(body), {"content-type": "application/json"})
        call.wfile.write(body)

    def _send(self, call: BaseHTTPRequestHandler, name: str, with_body: bool) -> None:
        content = self.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if name in self.damaged:
            content = bytes(len(content))
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        begin = int(found[1]) if found else 0
        headers = {"etag": etag, "x-repo-commit": self.commit, "accept-ranges": "bytes"}
        if found:
            headers["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._head(call, 206 if found else 200, len(content) - begin, headers)
        if not with_body:
            return
        if name.endswith(".safetensors"):
            self.ranges.append(begin)
            if self.stall_after is not None:
                call.wfile.write(content[begin : self.stall_after])
                call.wfile.flush()
                self.stalled.set()
                self._over.wait()
                return
        call.wfile.write(content[begin:])

    def _refuse(self, call: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self._head(call, status, 0, {"x-error-code": code, "x-error-message": code})

    def _head(self, call: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str]) -> None:
        call.send_response(status)
        for name, value in {**headers, "content-length": str(length)}.items():
            call.send_header(name, value)
        call.end_headers()
