"""The engines' addresses by their names, also while names are answered late or not at all."""

from __future__ import annotations

import asyncio
import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

Name = tuple[str, int, socket.AddressFamily]
PATIENCE_SECONDS = 0.5  # a look-up on the machine's own network takes milliseconds


class PatientResolver(AbstractResolver):
    """Asks the machine's resolver; while that is silent, goes on with the last answer it gave.

    What the resolver answers counts, also that a name does not exist. One look-up a name is under way at most, however
    many calls wait for it.
    """

    def __init__(self, resolver: AbstractResolver | None = None, patience: float = PATIENCE_SECONDS) -> None:
        self._resolver = resolver or ThreadedResolver()
        self._patience = patience
        self._known: dict[Name, list[ResolveResult]] = {}
        self._asking: dict[Name, asyncio.Task[list[ResolveResult] | OSError]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`. Raises `OSError` as the machine's resolver does."""
        name = (host, port, family)
        asking = self._asking.get(name)
        if asking is None:
            asking = self._asking[name] = asyncio.create_task(self._ask(name))
        known = self._known.get(name)
        await asyncio.wait({asking}, timeout=None if known is None else self._patience)
        found = asking.result() if asking.done() else None
        if isinstance(found, list):
            return found
        if known is not None and (found is None or found.errno == socket.EAI_AGAIN):
            return known
        assert found is not None  # without an earlier answer this one was waited for
        raise found

    async def _ask(self, name: Name) -> list[ResolveResult] | OSError:
        try:
            found = self._known[name] = await self._resolver.resolve(*name)
        except OSError as problem:
            return problem
        finally:
            del self._asking[name]
        return found

    async def close(self) -> None:
        """Wait for nothing that is still asked."""
        for asking in self._asking.values():
            asking.cancel()
        await self._resolver.close()
