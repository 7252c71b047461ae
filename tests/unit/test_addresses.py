"""Whose request it is: only what trusted proxies wrote counts."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.addresses import Addresses

TRUSTED = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128"))


@pytest.mark.parametrize(("peer", "forwarded", "client"), [
    ("203.0.113.9", None, "203.0.113.9"),
    ("203.0.113.9", "1.2.3.4", "203.0.113.9"),
    ("10.0.0.1", "1.2.3.4", "1.2.3.4"),
    ("10.0.0.1", "9.9.9.9, 1.2.3.4", "1.2.3.4"),
    ("10.0.0.1", "9.9.9.9, 1.2.3.4, 10.0.0.2", "1.2.3.4"),
    ("10.0.0.1", "9.9.9.9, junk, 10.0.0.2", "10.0.0.2"),
    ("10.0.0.1", "", "10.0.0.1"),
    ("::1", "2001:db8::1", "2001:db8::1"),
    ("10.0.0.1", "::ffff:1.2.3.4", "1.2.3.4"),
    ("", "1.2.3.4", ""),
])  # fmt: skip
def test_the_first_address_from_the_right_that_is_no_proxy(peer: str, forwarded: str | None, client: str):
    assert Addresses(TRUSTED).client(peer, forwarded.encode() if forwarded is not None else None) == client


@given(st.text(max_size=60))
def test_what_a_caller_writes_in_front_changes_nothing(forged: str):
    header = f"{forged}, 1.2.3.4".encode("utf-8", "surrogatepass")

    assert Addresses(TRUSTED).client("10.0.0.1", header) == "1.2.3.4"
