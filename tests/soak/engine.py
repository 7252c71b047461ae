"""The vLLM double with a journal: each ended request is a line on disk and then forgotten, so that it may run for hours.

A line is `[request id, prompt tokens, completion tokens, state]`. What runs when the process is killed leaves none.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.doubles import vllm_server
from tests.doubles.vllm import VllmDouble
from tests.doubles.vllm_engine import Engine, Record


class Journal(Engine):
    """An engine that keeps only what runs."""

    file: int

    def record(self, path: str, headers: dict[str, str], body: bytes) -> Record:
        """Begin a record that writes itself down when it ends."""
        entry = super().record(path, headers, body[:0])
        plain_end = entry.end

        def end(state: str) -> None:
            if entry.ended_at is None:
                plain_end(state)
                line = [entry.request_id, entry.prompt_tokens, entry.completion_tokens, state]
                os.write(self.file, json.dumps(line).encode() + b"\n")
                self.records.remove(entry)

        entry.end = end  # type: ignore[method-assign]
        return entry


class JournalledDouble(VllmDouble):
    """Starts this file as a process; `lines` are all lives' journal."""

    def __init__(self, journal: Path, **options: Any) -> None:
        super().__init__(**options)
        self.journal = journal
        self._argv[2:3] = ["tests.soak.engine", str(journal)]

    def lines(self) -> list[tuple[str | None, int, int, str]]:
        """Everything written so far, oldest first."""
        return [tuple(json.loads(line)) for line in self.journal.read_text().splitlines()]


def main(argv: list[str]) -> None:
    """`engine.py JOURNAL …`, the rest as for `vllm_server`."""
    Journal.file = os.open(argv[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    vllm_server.Engine = Journal  # type: ignore[misc]
    asyncio.run(vllm_server.serve(vllm_server.arguments(argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
