"""What `make up` prints at the end: URLs, the first key (once), and a curl that works as it stands."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

QUESTION = "What is the capital of France? Answer in one sentence."
Keys = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


class FirstKeyError(Exception):
    """The first key could not be made; the message says why."""


def first_key(keys: Keys) -> str | None:
    """The secret of a new key when there is none yet, else None. `keys` runs `gateway keys …`.

    A secret is told by the gateway at this moment only; it is stored nowhere.
    """
    listed = keys(["list", "--json"])
    if listed.returncode != 0:
        raise FirstKeyError(f"the keys cannot be listed: {_last(listed.stderr)}")
    if json.loads(listed.stdout)["data"]:
        return None
    made = keys(["create", "--name", "first", "--json"])
    if made.returncode != 0:
        raise FirstKeyError(f"the first key cannot be made: {_last(made.stderr)}")
    secret = json.loads(made.stdout)["secret"]
    assert isinstance(secret, str)
    return secret


@dataclass(frozen=True)
class Address:
    """Where the API is reached: its URL, what curl needs to trust and find it, a word on the certificate."""

    url: str
    curl: str
    certificate: str


def address(https_port: int, certificate: Path, public: str | None = None) -> Address:
    """By this machine's own `certificate`, or by the host name `public`, which a public authority vouches for."""
    port = "" if https_port == 443 else f":{https_port}"
    if public is not None:
        resolve = f"--resolve {public}:{https_port}:127.0.0.1 "  # as it stands, from this machine
        return Address(f"https://{public}{port}", resolve, "Let's Encrypt, as soon as it is there")
    host, resolve = _name(certificate, https_port)
    return Address(f"https://{host}{port}", f"--cacert {certificate} {resolve}", str(certificate))


def curl(where: Address, model: str, key: str | None) -> str:
    """A chat request for a shell; with the key where it is new, else with a place for it."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    return (
        f"curl {where.curl}{where.url}/v1/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key or '$KEY'}' -H 'Content-Type: application/json' \\\n"
        f"  -d '{json.dumps(body)}'"
    )


def text(where: Address, model: str, key: str | None, more: dict[str, str]) -> str:
    """The whole farewell of `make up`."""
    lines = ["", f"  API      {where.url}/v1    (certificate: {where.certificate})"]
    lines += [f"  {name:<8} {url}" for name, url in more.items()]
    if key is not None:
        lines += ["", f"  First API key, shown this once:  {key}"]
    else:
        lines += ["", "  Keys exist already; another one:  scripts/keys create --name NAME"]
    request = curl(where, model, key)
    return "\n".join([*lines, "", "  Try:", *(f"  {line}" for line in request.splitlines()), ""])


def _name(certificate: Path, https_port: int) -> tuple[str, str]:
    """A host that the certificate is for, and what curl needs to find it here."""
    leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "127.0.0.1", ""
    if "127.0.0.1" in {str(address) for address in names.get_values_for_type(x509.IPAddress)}:
        return "127.0.0.1", ""
    hosts = [host.replace("*.", "llm.", 1) for host in names.get_values_for_type(x509.DNSName)]
    return (hosts[0], f"--resolve {hosts[0]}:{https_port}:127.0.0.1 ") if hosts else ("127.0.0.1", "")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
