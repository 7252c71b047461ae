"""The lean path to the engines leans on what aiohttp does not promise. This fails when another aiohttp is installed.

Then: run tests/integration/test_upstream_*.py and tests/integration/test_gateway_*.py with the new version added to
`LEAN_VERSIONS`; if they pass, keep it there; if not, mend `Upstream._open_lean` or leave the session in its place.
"""

from __future__ import annotations

import inspect

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from gateway.upstream import LEAN_VERSIONS


def test_installed_aiohttp_is_one_that_was_tried() -> None:
    assert aiohttp.__version__ in LEAN_VERSIONS


def test_what_is_used_has_the_form_that_was_tried() -> None:
    assert list(inspect.signature(aiohttp.TCPConnector.connect).parameters) == ["self", "req", "traces", "timeout"]
    for name in ("connection_lost", "close", "transport"):
        assert hasattr(ResponseHandler, name)
    for name in ("protocol", "transport", "close"):
        assert hasattr(Connection, name)
    assert {"method", "url", "loop"} <= inspect.signature(aiohttp.ClientRequest.__init__).parameters.keys()
