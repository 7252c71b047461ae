"""Log lines leave through one thread, so that a slow reader of stdout never stops the event loop. Bounded; what does
not fit is dropped and counted."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Any

import msgspec

from gateway import kernel

MAX_LINES = 20_000
BATCH_SECONDS = 0.05  # lines wait at most this long, and leave in one write

_encode = msgspec.json.Encoder(enc_hook=str).encode


class LineWriter:
    """Writes JSON objects, one a line, to a file descriptor. `write` and `write_line` are the event loop's."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._awake = False  # as the event, without asking it
        self._stop = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log-lines", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Queue one line; never waits."""
        self.write_line(_encode(record) + b"\n")

    def write_line(self, line: bytes) -> None:
        """Queue one line that is JSON already and has its line feed; never waits."""
        if len(self._lines) >= MAX_LINES:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._awake:
            self._awake = True
            self._wake.set()

    def _run(self) -> None:
        kernel.stand_back()
        while not self._stop:
            self._wake.wait()
            self._wake.clear()
            # While lines come it sleeps and writes: every further wait costs the event loop a change of thread.
            while not self._stop:
                time.sleep(BATCH_SECONDS)
                if not self._drain():
                    break
            self._awake = False
            if self._lines:  # one came before that could be seen
                self._awake = True
                self._wake.set()
        self._drain()

    def _drain(self) -> bool:
        """Write what there is; whether there was anything."""
        found = bool(self._lines)
        while self._lines:
            batch = b"".join(self._lines.popleft() for _ in range(min(len(self._lines), 500)))
            view = memoryview(batch)
            try:
                while view:
                    view = view[os.write(self._descriptor, view) :]
            except OSError:
                self.dropped += batch.count(b"\n")  # the reader is gone; serving goes on
        return found

    def close(self, seconds: float = 2.0) -> None:
        """Write what is left, waiting at most `seconds`."""
        self._stop = True
        self._wake.set()
        self._thread.join(seconds)
