"""The ledger against the engine's journal, call by call; and the roll-up against the records."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from gateway.store import Database, StoreUnavailable
from tests.soak.site import Site


@dataclass
class Row:
    """One record of the ledger."""

    key: str
    day: str
    prompt: int
    completion: int
    outcome: str


@dataclass
class Comparison:
    """What `Watcher.compare` found. Differences in tokens, engine less ledger."""

    whole: int = 0  # calls that ended well, compared exactly
    different: list[str] = field(default_factory=list)
    unfinished: int = 0  # calls that did not
    unfinished_behind: int = 0
    invented: list[str] = field(default_factory=list)  # more in the ledger than the engine did
    missing: list[str] = field(default_factory=list)  # the engine worked, and the ledger has nothing
    unwitnessed: int = 0  # the engine was killed before it could write its line
    unseen: list[str] = field(default_factory=list)  # a caller saw the end, the ledger says otherwise


class Watcher:
    """Reads new records while the gateway runs, before retention deletes them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._database = Database(site.gateway.environment["DATABASE_URL"])
        self._last = 0
        self.rows: dict[str, Row] = {}
        self.twice: list[str] = []

    async def run(self) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable):
                await asyncio.to_thread(self.read)
            await asyncio.sleep(2)

    def query(self, text: str) -> list[Any]:
        """Rows, as an outsider reads them."""
        with self._database.session():
            return self._database.rows(text)

    def read(self) -> None:
        """Take over what is new."""
        # A group's rows get their ids in one transaction, so no smaller id appears later.
        text = (
            "SELECT id, request_id, key_id, day, prompt_tokens, completion_tokens, outcome FROM usage_records "
            f"WHERE id > {self._last} ORDER BY id"
        )
        for number, request_id, *rest in self.query(text):
            if request_id in self.rows:
                self.twice.append(request_id)
            self.rows[request_id] = Row(*rest)
            self._last = number

    def holds(self) -> int:
        """Holds in the database."""
        return int(self.query("SELECT COUNT(*) FROM holds")[0][0])

    def oldest(self) -> float:
        """When the oldest record that is left began, Unix seconds of the fast clock."""
        return float(self.query("SELECT MIN(started_at) FROM usage_records")[0][0])

    def days(self) -> Counter[str]:
        """Tokens by day."""
        tokens: Counter[str] = Counter()
        for row in self.rows.values():
            tokens[row.day] += row.prompt + row.completion
        return tokens

    def totals(self) -> tuple[dict[tuple[str, str], tuple[int, int]], dict[tuple[str, str], tuple[int, int]]]:
        """`(day, key)` → tokens and records: as summed here from every record ever read, and as rolled up."""
        summed: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for row in self.rows.values():
            entry = summed[row.day, row.key]
            entry[0] += row.prompt + row.completion
            entry[1] += 1
        text = (
            "SELECT day, key_id, SUM(prompt_tokens + completion_tokens), SUM(requests + refusals) FROM daily_totals "
            "GROUP BY day, key_id"
        )
        rolled = {(day, key): (int(tokens), int(count)) for day, key, tokens, count in self.query(text)}
        return {key: (value[0], value[1]) for key, value in summed.items()}, rolled

    def compare(self, journal: list[tuple[str | None, int, int, str]], seen: dict[str, tuple[int, int]]) -> Comparison:
        """Every call of the engine and of the callers against the ledger."""
        found = Comparison()
        engine: dict[str, int] = defaultdict(int)
        for request_id, prompt, completion, _ in journal:
            if request_id is not None:
                engine[request_id] += prompt + completion
        for request_id, row in self.rows.items():
            settled = row.prompt + row.completion
            if request_id not in engine:
                found.unwitnessed += bool(settled)
            elif row.outcome == "ok":
                found.whole += 1
                if engine[request_id] != settled:
                    found.different.append(f"{request_id}: engine {engine[request_id]}, ledger {row}")
            else:
                found.unfinished += 1
                found.unfinished_behind += engine[request_id] - settled
                if settled > engine[request_id]:
                    found.invented.append(f"{request_id}: engine {engine[request_id]}, ledger {row}")
        for request_id, tokens in engine.items():
            if tokens and request_id not in self.rows:
                found.missing.append(f"{request_id}: {tokens}")
        for request_id, usage in seen.items():
            row = self.rows.get(request_id)
            if row is None or (row.prompt, row.completion, row.outcome) != (*usage, "ok"):
                found.unseen.append(f"{request_id}: told {usage}, ledger {row}")
        return found
