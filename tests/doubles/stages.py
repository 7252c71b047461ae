"""Auth, budget, ledger and store around one database, without HTTP: for tests of the truth itself."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loguru import logger

from gateway.call import Call, Outcome, Usage
from gateway.keyring import Keyring
from gateway.settings import Settings, load
from gateway.stages.auth import Auth
from gateway.stages.budget import Budget
from gateway.stages.ledger import Ledger
from gateway.store import Database, Started, Store
from gateway.wire import ENDPOINTS, Request

# A failing test shows what the store complained about, fields included.
logger.configure(
    handlers=[{"sink": lambda line: sys.stderr.write(line), "format": "{time:HH:mm:ss.SSS} {message} {extra}"}]
)

SECRET = "sk-team-0123456789"
CHAT = "/v1/chat/completions"


class Models:
    """A registry with one model, `m`, of a chosen length."""

    def __init__(self, length: int | None = 8192) -> None:
        self.length = length

    def max_model_len(self, model: str) -> int | None:
        return self.length if model == "m" else None

    def serves(self, model: str) -> bool:
        return model == "m"


class Clock:
    """A clock that moves when told; Unix seconds and monotonic seconds at once."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Stages:
    """Everything that a call needs for its accounting, wired as the gateway wires it."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.models = Models()
        clocks: dict[str, Any] = {} if clock is None else {"clock": clock}
        self.keyring = Keyring(settings, **clocks)
        self.store = Store(settings, self.keyring.apply)
        self.auth = Auth(self.keyring, **clocks)
        both: dict[str, Any] = {} if clock is None else {"clock": clock, "monotonic": clock}
        self.budget = Budget(settings, self.store, self.models, self.keyring, **both)
        self.ledger = Ledger(
            self.store, self.models, self.budget.live, self.budget.days, hold_seconds=settings.hold_seconds, **clocks
        )
        self.started: Started | None = None

    async def start(self) -> None:
        self.started = await self.store.start(lambda: frozenset(self.budget.live))
        await self.budget.start()
        self.ledger.start(self.budget.tick)

    async def stop(self) -> None:
        await self.ledger.stop()
        await self.store.close()

    def call(
        self,
        *,
        secret: str = SECRET,
        prompt: int = 100,
        output: int | None = 50,
        path: str = CHAT,
        model: str = "m",
        ip: str = "10.0.0.1",
        request_id: str | None = None,
        n: int = 1,
    ) -> Call:
        """A call whose body was read: `prompt` bounds its prompt tokens, `output` is what it asked for."""
        endpoint = ENDPOINTS[path]
        call = Call(request_id or os.urandom(16).hex(), endpoint, ip)
        self.auth.identify(call, {b"authorization": b"Bearer " + secret.encode()})
        call.request = Request(endpoint, b"{}", model)
        call.request.prompt_bound = prompt
        call.request.prompt_estimate = prompt // 4
        call.request.max_output = output if output is not None else endpoint.default_output
        call.request.n = n
        return call

    async def end(self, call: Call, prompt: int = 10, completion: int = 20, outcome: Outcome = Outcome.OK) -> None:
        """The call ends as the pipeline ends it."""
        call.usage = Usage(prompt, completion, 0, known=True)
        call.outcome = outcome
        await self.ledger.settle(call)
        self.close(call)

    def close(self, call: Call) -> None:
        self.ledger.close(call)
        self.budget.release(call)

    def rows(self, sql: str, *parameters: Any) -> list[Any]:
        """Read the database as an outsider."""
        database = Database(self.settings.database_url)
        with database.session():
            return database.rows(sql, parameters)


def settings_for(folder: Path, **environment: Any) -> Settings:
    """Settings with a database in `folder` and one seeded key, `team`."""
    base = {
        "DATABASE_URL": f"sqlite:///{folder}/gateway.sqlite3",
        "GATEWAY_API_KEYS": f"team={SECRET}",
        "SPOOL_DIR": str(folder),
    }
    return load({**base, **{name: str(value) for name, value in environment.items()}})


@asynccontextmanager
async def stages(folder: Path, *, clock: Clock | None = None, **environment: Any) -> AsyncIterator[Stages]:
    """Started stages, stopped at the end."""
    made = Stages(settings_for(folder, **environment), clock)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
