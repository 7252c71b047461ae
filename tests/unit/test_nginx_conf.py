"""The rendered configuration: what must hold in each version and form."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from services.init import nginx_conf
from services.init.nginx_conf import ERRORS, RENDERED_FOR, Edge, parse_version, render

from gateway.settings import Settings

EDGE = Edge()
every_version = pytest.mark.parametrize("version", RENDERED_FOR)


@every_version
def test_nothing_is_left_to_fill_in(version: nginx_conf.Version) -> None:
    assert "@{" not in render(EDGE, version)


def test_what_differs_by_version() -> None:
    old, middle, new = (render(EDGE, version) for version in RENDERED_FOR)
    assert "listen 8443 ssl http2 default_server;" in old
    assert "http2 on;" not in old
    assert "http2 on;" in middle
    assert " resolve " not in middle
    assert "server gateway:8080 resolve max_fails=0;" in new
    assert "?X25519MLKEM768:" in new
    assert "X25519MLKEM768" not in old


def test_too_old_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.20\.1 is too old"):
        render(EDGE, (1, 20, 1))


@pytest.mark.parametrize(
    ("text", "version"),
    [("nginx version: nginx/1.22.1", (1, 22, 1)), ("nginx:1.30.5-alpine", (1, 30, 5)), ("1.30", (1, 30, 0))],
)
def test_versions_are_read_as_programs_tell_them(text: str, version: nginx_conf.Version) -> None:
    assert parse_version(text) == version


def test_the_running_openssl_counts() -> None:
    assert nginx_conf.openssl_version("built with OpenSSL 3.0.8 (running with OpenSSL 3.5.1)") == (3, 5)
    assert nginx_conf.openssl_version("built with BoringSSL") == (0, 0)


def test_limits_of_zero_are_none() -> None:
    text = render(replace(EDGE, requests_per_second=0, connections=0), RENDERED_FOR[-1])
    assert "limit_req " not in text
    assert "limit_conn " not in text


@pytest.mark.parametrize("status", sorted(ERRORS))
def test_every_error_body_is_openais(status: int) -> None:
    text = render(EDGE, RENDERED_FOR[-1])
    [body] = re.findall(rf"return {status} '(\{{\"error\".*?\}})';", text)
    error = json.loads(body.replace("\\'", "'"))["error"]
    assert set(error) == {"message", "type", "code", "param"}


def test_the_edge_waits_longer_than_any_deadline_of_the_gateway() -> None:
    fields = Settings.model_fields
    for name in ("first_byte_seconds", "idle_seconds", "queue_seconds", "drain_seconds"):
        assert fields[name].default < nginx_conf.READ_SECONDS
    assert Settings.model_construct().whole_answer_seconds < nginx_conf.READ_SECONDS


def test_the_body_limit_is_the_gateways() -> None:
    assert EDGE.max_body_bytes == Settings.model_fields["max_body_bytes"].default


def test_letsencrypt_needs_the_pinned_image() -> None:
    acme = replace(EDGE, acme_email="it@example.com", acme_hosts=("a.test", "b.test"))
    with pytest.raises(ValueError, match="pinned nginx image"):
        render(acme, (1, 22, 1))
    text = render(acme, RENDERED_FOR[-1])
    assert "acme_certificate letsencrypt a.test b.test;" in text
    assert "load_module modules/ngx_http_acme_module.so;" in text
    assert "/etc/edge/certificates" not in text


def test_hsts_only_on_request() -> None:
    assert "Strict-Transport" not in render(EDGE, RENDERED_FOR[-1])
    assert "Strict-Transport-Security max-age=63072000" in render(replace(EDGE, hsts=True), RENDERED_FOR[-1])


def test_idle_connections_are_closed_by_nginx_before_the_gateway_does() -> None:
    source = (nginx_conf.TEMPLATE.parents[1] / "services/gateway/src/gateway/server.py").read_text()
    [seconds] = re.findall(r"keep_alive_timeout = ([0-9.]+)", source)
    assert EDGE.upstream_keepalive_seconds < float(seconds)
