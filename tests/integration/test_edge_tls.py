"""The TLS that the edge speaks, seen by a client: versions, ciphers, HTTP/2, the certificate and its replacement."""

from __future__ import annotations

import datetime as dt
import os
import socket
import ssl
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from services.init import certificate
from tests.doubles import edge_running
from tests.doubles.edge_running import Edge, needs_nginx
from tests.doubles.waiting import wait_until

pytestmark = needs_nginx
NOW = dt.datetime.now(dt.UTC)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge_running.edge(tmp_path_factory.mktemp("edge")) as running:
        yield running


def handshake(edge: Edge, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", edge.https), timeout=60)
    return context.wrap_socket(plain, server_hostname=name)


def limited_to(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that they are old is the point
        context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(edge: Edge, version: ssl.TLSVersion) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(edge, limited_to(version)).close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_today_s_versions_are_spoken(edge: Edge, version: ssl.TLSVersion) -> None:
    with handshake(edge, limited_to(version)) as secure:
        assert secure.version() == version.name.replace("_", ".")


@pytest.mark.parametrize("cipher", ["AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES256-SHA384"])
def test_weak_ciphers_are_refused(edge: Edge, cipher: str) -> None:
    context = limited_to(ssl.TLSVersion.TLSv1_2)
    context.set_ciphers(f"{cipher}:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(edge, context).close()


def test_the_self_signed_certificate_can_be_trusted_by_name(edge: Edge) -> None:
    for name in ("localhost", "edge.test", "127.0.0.1"):
        with handshake(edge, edge.trust(), name) as secure:
            assert secure.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(edge, edge.trust(), "other.test").close()


@pytest.mark.parametrize("offered", ["h2", "http/1.1"])
def test_both_protocols_are_offered(edge: Edge, offered: str) -> None:
    context = edge.trust()
    context.set_alpn_protocols([offered])
    with handshake(edge, context) as secure:
        assert secure.selected_alpn_protocol() == offered


def test_a_certificate_is_replaced_without_losing_a_connection(tmp_path: Path) -> None:
    with (
        edge_running.edge(tmp_path) as edge,
        edge.client() as client,
        client.stream("GET", "/v1/stream?chunks=60&gap=0.02") as running,
    ):
        lines = running.iter_lines()
        next(lines)
        old = edge.trust()
        chain, key = certificate.self_signed(("own.test",), NOW)
        (tmp_path / "own" / certificate.CHAIN).write_bytes(chain)
        (tmp_path / "own" / certificate.KEY).write_bytes(key)
        installed = certificate.install(tmp_path / "own", tmp_path / "certificates", ("edge.test",))
        assert (installed.origin, installed.changed) == ("own", True)
        os.chmod(tmp_path / "certificates" / certificate.KEY, 0o400)
        edge.reload()

        def new_one_is_served() -> bool:
            try:
                handshake(edge, edge.trust(), "own.test").close()
            except (ssl.SSLError, ConnectionError):
                return False
            return True

        def old_one_is_gone() -> bool:
            try:
                handshake(edge, old).close()
            except ssl.SSLCertVerificationError:
                return True
            return False

        wait_until("the new certificate is served", new_one_is_served)
        # New workers begin before the old ones are told to stop: for a moment both answer.
        wait_until("the old certificate is served no more", old_one_is_gone)
        assert list(lines)[-2] == "data: [DONE]"


@pytest.mark.long
def test_a_stream_runs_on_for_minutes_after_a_reload(tmp_path: Path) -> None:
    """A thinking model's answer takes minutes; nginx cut off what ran when its patience with old workers was one."""
    with (
        edge_running.edge(tmp_path) as edge,
        edge.client() as client,
        client.stream("GET", "/v1/stream?chunks=8&gap=10") as running,
    ):
        lines = running.iter_lines()
        next(lines)
        edge.reload()
        assert list(lines)[-2] == "data: [DONE]"
