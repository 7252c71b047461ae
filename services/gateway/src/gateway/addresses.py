"""Whose request it is when proxies stand before us: X-Forwarded-For counts only as far as trusted proxies wrote it."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.settings import Network

MAX_CACHED = 4096


class Addresses:
    """Finds client addresses. `trusted` are the proxies' networks (TRUSTED_PROXIES)."""

    def __init__(self, trusted: tuple[Network, ...]) -> None:
        self._trusted = trusted
        self._known: dict[str, tuple[str, bool]] = {}

    def client(self, peer: str, forwarded: bytes | None) -> str:
        """The address that made the request: from the right, the first one that is not a trusted proxy.

        An entry that is no address ends the walk: what stands left of it was written by someone unknown.
        """
        address, trusted = self._look(peer)
        if forwarded is None or not trusted:
            return address
        for entry in reversed(forwarded.decode("latin-1").split(",")):
            candidate, trusted = self._look(entry.strip())
            if not candidate:
                return address
            address = candidate
            if not trusted:
                return address
        return address

    def _look(self, text: str) -> tuple[str, bool]:
        found = self._known.get(text)
        if found is None:
            found = self._parse(text)
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            self._known[text] = found
        return found

    def _parse(self, text: str) -> tuple[str, bool]:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return "", False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return str(address), any(address in network for network in self._trusted)
