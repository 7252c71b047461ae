"""The edge's certificate: the user's own when there is one, else self-signed and renewed before it ends.

The user's files are only read. What nginx serves is a copy in a folder of ours, so that its key has the one
owner who needs it and both files change together.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CHAIN = "fullchain.pem"
KEY = "privkey.pem"
LIFETIME = dt.timedelta(days=397)  # what clients at most accept of a leaf
RENEW_BEFORE = dt.timedelta(days=30)
_ISSUED_BY_US = "LLM appliance (self-signed)"
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)


class CertificateError(Exception):
    """A certificate that cannot be served; the message names the file and the remedy in one line."""


@dataclass(frozen=True, slots=True)
class Installed:
    """What nginx serves now."""

    origin: str  # "own" or "self-signed"
    ends: dt.datetime
    changed: bool


def parse_hosts(text: str) -> tuple[str, ...]:
    """The names and addresses in `APPLIANCE_HOSTS`, comma-separated; `CertificateError` for others."""
    hosts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for host in hosts:
        if not _is_address(host) and not _HOST.fullmatch(host.removeprefix("*.")):
            raise CertificateError(f"APPLIANCE_HOSTS: {host!r} is neither a host name nor an IP address")
    return hosts


def install(own: Path, served: Path, hosts: tuple[str, ...], now: dt.datetime | None = None) -> Installed:
    """Make `served` hold what nginx should serve: the files in `own`, else a self-signed pair for `hosts`.

    A self-signed pair is made when there is none, when it ends within 30 days or when `hosts` changed. Raises
    `CertificateError` when the user's files cannot be served; nothing is changed then.
    """
    now = now or dt.datetime.now(dt.UTC)
    served.mkdir(parents=True, exist_ok=True)
    if (own / CHAIN).exists() or (own / KEY).exists():
        chain, key = check_own(own, now)
        changed = _write_pair(served, chain, key)
        return Installed("own", _leaf(chain).not_valid_after_utc, changed)
    present = _present(served)
    if present is not None and _still_good(present, hosts, now):
        return Installed("self-signed", present.not_valid_after_utc, False)
    chain, key = self_signed(hosts, now)
    _write_pair(served, chain, key)
    return Installed("self-signed", _leaf(chain).not_valid_after_utc, True)


def check_own(own: Path, now: dt.datetime) -> tuple[bytes, bytes]:
    """The user's chain and key, read and proven to be a pair that is valid now. Raises `CertificateError`."""
    chain, key = _read(own / CHAIN), _read(own / KEY)
    try:
        leaf = _leaf(chain)
    except ValueError:
        raise CertificateError(f"{own / CHAIN} holds no certificate in PEM form") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except TypeError:
        raise CertificateError(
            f"{own / KEY} is protected by a passphrase; remove it (openssl pkey -in … -out …)"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"{own / KEY} holds no private key in PEM form") from None
    if _public_bytes(private.public_key()) != _public_bytes(leaf.public_key()):
        raise CertificateError(f"{own / KEY} is not the key of the first certificate in {own / CHAIN}")
    if leaf.not_valid_after_utc <= now:
        raise CertificateError(f"{own / CHAIN} ended on {leaf.not_valid_after_utc:%Y-%m-%d}; put a current one there")
    if leaf.not_valid_before_utc > now:
        raise CertificateError(f"{own / CHAIN} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    return chain, key


def self_signed(hosts: tuple[str, ...], now: dt.datetime) -> tuple[bytes, bytes]:
    """A new ECDSA P-256 pair for `hosts` (and this machine's loopback names), PEM: chain, key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _ISSUED_BY_US)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))  # clocks of clients differ
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in _names(hosts)]), critical=False)
        # Trusting this one certificate must work in every client, also strict ones, hence it may sign: for its own
        # names only, so that whoever trusts it trusts nothing else with it.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.NameConstraints([_subtree(host) for host in _names(hosts)], None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_key_usage(), critical=True)
        .sign(private, hashes.SHA256())
    )
    key = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key


def acme_ends(state: Path) -> dt.datetime | None:
    """When the newest certificate of nginx's ACME module (`.crt` in its folder `state`) ends; None: there is none."""
    kept = sorted(state.glob("*.crt"), key=lambda path: path.stat().st_mtime)
    try:
        return _leaf(kept[-1].read_bytes()).not_valid_after_utc if kept else None
    except (OSError, ValueError):  # being written: the next look finds it whole
        return None


def fingerprint(folder: Path) -> str:
    """A digest of the two files in `folder` as they are now, to see a change; empty when one is missing."""
    digest = hashlib.sha256()
    try:
        for name in (CHAIN, KEY):
            digest.update((folder / name).read_bytes())
    except OSError:
        return ""
    return digest.hexdigest()


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _names(hosts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*hosts, "localhost", "127.0.0.1", "::1")))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host)


def _subtree(host: str) -> x509.GeneralName:
    """`host` as what a certificate may be made for: an address as a network of one, a wildcard as its domain."""
    if _is_address(host):
        return x509.IPAddress(ipaddress.ip_network(host))
    return x509.DNSName(host.removeprefix("*."))


def _leaf(chain: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificates(chain)[0]


def _public_bytes(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined, no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing: {CHAIN} and {KEY} belong together") from None
    except OSError as problem:
        raise CertificateError(f"{path} cannot be read: {problem.strerror}") from None


def _present(served: Path) -> x509.Certificate | None:
    try:
        return _leaf((served / CHAIN).read_bytes()) if (served / KEY).is_file() else None
    except (OSError, ValueError):
        return None


def _still_good(certificate: x509.Certificate, hosts: tuple[str, ...], now: dt.datetime) -> bool:
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if not common or common[0].value != _ISSUED_BY_US:
        return False  # the user's own, which has been taken out of its folder since
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names) == {_general_name(host) for host in _names(hosts)} and (
        certificate.not_valid_after_utc - now > RENEW_BEFORE
    )


def _write_pair(served: Path, chain: bytes, key: bytes) -> bool:
    if fingerprint(served) == hashlib.sha256(chain + key).hexdigest():
        return False
    # The key first: whoever reads between the two renames sees a pair that does not match and tries again.
    for name, content in ((KEY, key), (CHAIN, chain)):
        handle, temporary = tempfile.mkstemp(dir=served, prefix=f".{name}.")  # created readable to us alone
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, served / name)
    return True
