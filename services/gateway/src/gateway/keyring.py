"""The keys in memory: what `auth` looks up on every call.

The database is the truth; this is its last good copy. Changes arrive as whole keys with all their secrets, so applying
one twice, or after a newer one, does no harm (a key's `generation` only grows). An older database in the place of the
one that was read begins anew. While the database is away the copy stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gateway.call import Caller
from gateway.errors import GatewayError, InvalidApiKey, KeyDisabled, KeyExpired
from gateway.keys import Key, Secret
from gateway.settings import Settings

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one secret opens: its digest, the key, and the secret's own validity (Unix seconds)."""

    digest: bytes
    caller: Caller
    not_before: float
    not_after: float | None


class Keyring:
    """Secrets and callers by digest and by id. Owned by the event loop."""

    def __init__(self, settings: Settings, clock: Clock = time.time) -> None:
        self._settings = settings
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        self._digests: dict[str, tuple[bytes, ...]] = {}
        self._callers: dict[str, Caller] = {}
        self._generations: dict[str, int] = {}
        self.loaded = False
        self.on_revoked: Callable[[str, GatewayError], None] | None = None

    def apply(self, changes: Iterable[tuple[Key, list[Secret]]], whole: bool = False) -> None:
        """Take over keys as they now are. Keys that stop being valid are told to `on_revoked`.

        `whole`: those are all keys there are, of a database whose generations began anew.
        """
        if whole:
            changes = list(changes)
            self._generations.clear()
            for key_id in self._callers.keys() - {key.id for key, _ in changes}:
                self._forget(key_id)
        for key, secrets in changes:
            if self._generations.get(key.id, -1) >= key.generation:
                continue
            self._generations[key.id] = key.generation
            if key.deleted_at is not None:
                self._forget(key.id)
                continue
            before = self._close(key.id)
            caller = key.caller(self._settings)
            self._callers[key.id] = caller
            for secret in secrets:
                self._entries[secret.digest] = Entry(secret.digest, caller, secret.not_before, secret.not_after)
            self._digests[key.id] = tuple(secret.digest for secret in secrets)
            if (problem := self.problem(caller)) is not None:
                self._revoke(key.id, problem)
            elif before and not any(self._valid(self._entries.get(digest)) for digest in before):
                # Every secret that a running call can have used was revoked at once (a leaked secret, say).
                self._revoke(key.id, InvalidApiKey("The secret of this key was revoked."))
        self.loaded = True

    def _close(self, key_id: str) -> tuple[bytes, ...]:
        """Nothing opens this key any longer; returns what did."""
        before = self._digests.pop(key_id, ())
        for digest in before:
            self._entries.pop(digest, None)
        return before

    def _forget(self, key_id: str) -> None:
        self._close(key_id)
        self._callers.pop(key_id, None)
        self._revoke(key_id, KeyDisabled("This key was deleted."))

    def _revoke(self, key_id: str, cause: GatewayError) -> None:
        if self.on_revoked is not None:
            self.on_revoked(key_id, cause)

    def _valid(self, entry: Entry | None) -> bool:
        return entry is not None and (entry.not_after is None or entry.not_after > self._clock())

    def find(self, digest: bytes) -> Entry | None:
        """The entry of a secret's digest, valid in time or not."""
        return self._entries.get(digest)

    def caller(self, key_id: str) -> Caller | None:
        """The key as it is now; None when it was deleted."""
        return self._callers.get(key_id)

    def callers(self) -> Iterable[Caller]:
        """Every key there is."""
        return self._callers.values()

    def problem(self, caller: Caller) -> GatewayError | None:
        """Why a known key may not call now: disabled or expired."""
        if caller.disabled:
            return KeyDisabled("This key is disabled.")
        if caller.expires_at is not None and self._clock() >= caller.expires_at:
            return KeyExpired("This key has expired.")
        return None

    def __len__(self) -> int:
        return len(self._callers)
