"""What `init` makes: certificates, secrets, settings; in folders of the test, without containers."""

from __future__ import annotations

import datetime as dt
import os
import re
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from services.init import __main__ as init
from services.init import certificate, secret_files, settings
from services.init.certificate import CertificateError

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


def served(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / certificate.CHAIN).read_bytes())


def drop_own(folder: Path, hosts: tuple[str, ...] = ("own.test",), made: dt.datetime = NOW) -> tuple[bytes, bytes]:
    folder.mkdir(exist_ok=True)
    chain, key = certificate.self_signed(hosts, made)
    (folder / certificate.CHAIN).write_bytes(chain)
    (folder / certificate.KEY).write_bytes(key)
    return chain, key


def test_a_self_signed_certificate_is_ecdsa_with_the_hosts(tmp_path: Path) -> None:
    installed = certificate.install(tmp_path / "own", tmp_path / "served", ("llm.test", "192.0.2.7"), NOW)
    assert installed.origin == "self-signed"
    made = served(tmp_path / "served")
    assert isinstance(made.public_key(), ec.EllipticCurvePublicKey)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"llm.test", "localhost"}
    assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"192.0.2.7", "127.0.0.1", "::1"}
    allowed = made.extensions.get_extension_for_class(x509.NameConstraints)
    assert allowed.critical
    assert allowed.value.permitted_subtrees is not None
    assert {str(name.value) for name in allowed.value.permitted_subtrees} == {
        "llm.test", "localhost", "192.0.2.7/32", "127.0.0.1/32", "::1/128",
    }  # fmt: skip
    assert stat.S_IMODE((tmp_path / "served" / certificate.KEY).stat().st_mode) & 0o077 == 0


def test_it_is_kept_until_30_days_before_its_end(tmp_path: Path) -> None:
    first = certificate.install(tmp_path / "own", tmp_path / "served", (), NOW)
    assert first.changed
    early = certificate.install(tmp_path / "own", tmp_path / "served", (), first.ends - 31 * DAY)
    assert (early.changed, early.ends) == (False, first.ends)
    late = certificate.install(tmp_path / "own", tmp_path / "served", (), first.ends - 29 * DAY)
    assert late.changed
    assert late.ends > first.ends


def test_new_hosts_make_a_new_one(tmp_path: Path) -> None:
    certificate.install(tmp_path / "own", tmp_path / "served", ("a.test",), NOW)
    assert not certificate.install(tmp_path / "own", tmp_path / "served", ("a.test",), NOW).changed
    assert certificate.install(tmp_path / "own", tmp_path / "served", ("b.test",), NOW).changed


def test_the_users_own_is_served_untouched_and_never_overwritten(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "served"
    certificate.install(own, folder, (), NOW)
    chain, key = drop_own(own)
    installed = certificate.install(own, folder, (), NOW)
    assert (installed.origin, installed.changed) == ("own", True)
    assert not certificate.install(own, folder, (), NOW + 200 * DAY).changed
    assert ((folder / certificate.CHAIN).read_bytes(), (folder / certificate.KEY).read_bytes()) == (chain, key)
    assert ((own / certificate.CHAIN).read_bytes(), (own / certificate.KEY).read_bytes()) == (chain, key)
    # Taken away again: ours comes back.
    for name in (certificate.CHAIN, certificate.KEY):
        (own / name).unlink()
    assert certificate.install(own, folder, (), NOW).origin == "self-signed"


def spoil(own: Path, how: str) -> None:
    """Make the user's pair unusable in one way."""
    other = certificate.self_signed(("other.test",), NOW)
    match how:
        case "no key":
            (own / certificate.KEY).unlink()
        case "no chain":
            (own / certificate.CHAIN).unlink()
        case "other key":
            (own / certificate.KEY).write_bytes(other[1])
        case "chain is text":
            (own / certificate.CHAIN).write_text("hello")
        case "key is text":
            (own / certificate.KEY).write_text("hello")
        case "key is a folder":
            (own / certificate.KEY).unlink()
            (own / certificate.KEY).mkdir()
        case "ended":
            drop_own(own, made=NOW - 500 * DAY)
        case "not yet":
            drop_own(own, made=NOW + 10 * DAY)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no key", "is missing"),
        ("no chain", "is missing"),
        ("other key", "is not the key"),
        ("chain is text", "no certificate in PEM"),
        ("key is text", "no private key in PEM"),
        ("key is a folder", "cannot be read"),
        ("ended", "ended on"),
        ("not yet", "not valid before"),
    ],
)
def test_an_unusable_pair_is_refused_and_changes_nothing(tmp_path: Path, how: str, words: str) -> None:
    own, folder = tmp_path / "own", tmp_path / "served"
    certificate.install(tmp_path / "none", folder, (), NOW)
    before = certificate.fingerprint(folder)
    drop_own(own)
    spoil(own, how)
    with pytest.raises(CertificateError) as refused:
        certificate.install(own, folder, (), NOW)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert certificate.fingerprint(folder) == before


def test_a_key_with_a_passphrase_says_so(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    own = tmp_path / "own"
    _, key = drop_own(own)
    private = serialization.load_pem_private_key(key, None)
    locked = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (own / certificate.KEY).write_bytes(locked)
    with pytest.raises(CertificateError, match="passphrase"):
        certificate.install(own, tmp_path / "served", (), NOW)


@pytest.mark.parametrize("host", ["bad host", "-a.test", "a..b", "a/b", "a;b", "x" * 70])
def test_hosts_that_are_none_are_refused(host: str) -> None:
    with pytest.raises(CertificateError, match="APPLIANCE_HOSTS"):
        certificate.parse_hosts(f"good.test,{host}")


def test_a_secret_is_made_once_and_a_given_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "secret"
    assert secret_files.ensure(path, None)
    first = path.read_text()
    assert len(first) >= 40
    assert not secret_files.ensure(path, None)
    assert not secret_files.ensure(path, " ")
    assert path.read_text() == first
    assert secret_files.ensure(path, "given-by-the-operator")
    assert path.read_text() == "given-by-the-operator"
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HTTPS_PORT": "0"}, "HTTPS_PORT"),
        ({"HTTPS_PORT": "443x"}, "HTTPS_PORT"),
        ({"HTTP_PORT": "70000"}, "HTTP_PORT"),
        ({"HTTP_PORT": "443"}, "they must differ"),
        ({"MAX_BODY_BYTES": "-1"}, "MAX_BODY_BYTES"),
        ({"EDGE_HSTS": "maybe"}, "EDGE_HSTS"),
        ({"LETSENCRYPT_EMAIL": "me@example.com"}, "APPLIANCE_HOSTS names no host"),
        ({"LETSENCRYPT_EMAIL": "me; } evil", "APPLIANCE_HOSTS": "a.test"}, "mail address"),
        ({"APPLIANCE_HOSTS": "a b"}, "APPLIANCE_HOSTS"),
        ({"LETSENCRYPT_EMAIL": "me@example.com", "APPLIANCE_HOSTS": "*.a.test"}, "wildcards"),
    ],
)
def test_bad_edge_variables_are_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(settings.SettingsError) as bad:
        settings.read(environment)
    assert words in str(bad.value)


def test_all_bad_edge_variables_are_named_at_once() -> None:
    with pytest.raises(settings.SettingsError) as bad:
        settings.read({"HTTPS_PORT": "x", "EDGE_HSTS": "x", "EDGE_CONNECTIONS": "x"})
    assert len(bad.value.problems) == 3


@pytest.mark.skipif(os.getuid() != 0, reason="init runs as root, this test does not")
def test_prepare_makes_everything_and_a_second_run_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "VOLUMES", tmp_path)
    monkeypatch.setattr(init, "OWN", tmp_path / "own")
    for name in init.DATA_OWNERS:
        (tmp_path / name).mkdir()
    init.prepare(settings.read({}))
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in first} >= {
        "vllm_api_key", "gateway_admin_key", "admin_password", "fullchain.pem", "privkey.pem", "nginx-1.27.3.conf",
    }  # fmt: skip
    engine, gateway = tmp_path / "engine-secrets", tmp_path / "gateway-secrets"
    assert (engine / "vllm_api_key").read_text() == (gateway / "vllm_api_key").read_text()
    assert not (engine / "gateway_admin_key").exists()
    assert (gateway / "gateway_admin_key").stat().st_uid == init.GATEWAY_UID
    assert (tmp_path / "edge-certificates" / "privkey.pem").stat().st_uid == init.NGINX_UID
    for name, (uid, gid) in init.DATA_OWNERS.items():
        assert ((tmp_path / name).stat().st_uid, (tmp_path / name).stat().st_gid) == (uid, gid)
    init.prepare(settings.read({}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first


def test_lets_encrypts_end_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "VOLUMES", tmp_path)
    monkeypatch.setattr(init, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "chown", lambda *_: None)
    monkeypatch.setattr(init.volumes, "own", lambda *_: None)
    chosen = settings.read({"APPLIANCE_HOSTS": "llm.example.com", "LETSENCRYPT_EMAIL": "it@example.com"})
    state = tmp_path / "edge-acme"
    state.mkdir()

    def told() -> set[str]:
        init.refresh(chosen)
        name = r"edge_certificate_not_after_timestamp_seconds (\d+)"
        return {end for path in (tmp_path / "edge-config").iterdir() for end in re.findall(name, path.read_text())}

    assert told() == set()  # there is none yet
    for made, file in ((NOW, "llm.example.com-1.crt"), (NOW + 60 * DAY, "llm.example.com-2.crt")):
        chain, _ = certificate.self_signed(("llm.example.com",), made)
        (state / file).write_bytes(chain)
        os.utime(state / file, (made.timestamp(), made.timestamp()))
        assert told() == {f"{(made + certificate.LIFETIME).timestamp():.0f}"}
    (state / "llm.example.com-2.crt").write_bytes(b"-----BEGIN CERTIFICATE")
    assert told() == set()
