"""Who is calling: which header counts, what is refused, and what is never repeated."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.doubles.stages import Clock

from gateway.call import Call
from gateway.client import Headers
from gateway.errors import GatewayError, InvalidApiKey, KeyDisabled, KeyExpired, LedgerUnavailable, MissingApiKey
from gateway.keyring import Keyring
from gateway.keys import Key, Secret, digest_of
from gateway.settings import load
from gateway.stages.auth import Auth
from gateway.wire import ENDPOINTS

GOOD = b"sk-good-0123456789"


class Ring:
    def __init__(self) -> None:
        self.clock = Clock()
        self.keyring = Keyring(load({}), self.clock)
        self.auth = Auth(self.keyring, self.clock)
        self.generation = 0

    def put(self, key_id: str = "key_1", *secrets: Secret, **fields: object) -> None:
        self.generation += 1
        key = Key(id=key_id, name="team", generation=self.generation, **fields)  # type: ignore[arg-type]
        self.keyring.apply([(key, list(secrets) or [Secret(digest_of(GOOD), key_id, 0, None)])])

    def identify(self, **headers: bytes) -> Call:
        call = Call("r", ENDPOINTS["/v1/chat/completions"], "ip")
        self.auth.identify(call, {name.replace("_", "-").encode(): value for name, value in headers.items()})
        return call


@pytest.fixture
def ring() -> Ring:
    ring = Ring()
    ring.put()
    return ring


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER   "])
def test_both_headers_work(ring, scheme):
    assert ring.identify(authorization=scheme + GOOD).caller.key_id == "key_1"
    assert ring.identify(x_api_key=GOOD).caller.key_id == "key_1"
    assert ring.identify(x_api_key=GOOD, authorization=scheme + GOOD).caller.key_id == "key_1"


def test_two_different_keys_are_refused(ring):
    with pytest.raises(InvalidApiKey):
        ring.identify(x_api_key=GOOD, authorization=b"Bearer sk-other")


@pytest.mark.parametrize("headers", [{}, {"authorization": b""}, {"authorization": b"Bearer "}, {"x_api_key": b" "}])
def test_nothing_sent_is_missing(ring, headers):
    with pytest.raises(MissingApiKey):
        ring.identify(**headers)


@given(st.binary(max_size=200))
def test_whatever_is_sent_is_refused_and_not_repeated(sent):
    ring = Ring()
    ring.put()
    with pytest.raises((InvalidApiKey, MissingApiKey)) as caught:
        ring.identify(authorization=b"Bearer " + sent)
    if len(sent.strip()) > 12:
        assert sent.strip().decode("latin-1") not in str(caught.value.body())


def test_disabled_expired_deleted(ring):
    ring.put(disabled=True)
    with pytest.raises(KeyDisabled):
        ring.identify(x_api_key=GOOD)
    ring.put(expires_at=ring.clock.now + 10)
    assert ring.identify(x_api_key=GOOD)
    ring.clock.now += 10
    with pytest.raises(KeyExpired):
        ring.identify(x_api_key=GOOD)
    ring.put(deleted_at=ring.clock.now)
    with pytest.raises(InvalidApiKey):
        ring.identify(x_api_key=GOOD)


def test_a_rotated_secret_works_until_its_grace_is_over(ring):
    new = b"sk-new-0123456789"
    end = ring.clock.now + 60
    ring.put("key_1", Secret(digest_of(GOOD), "key_1", 0, end), Secret(digest_of(new), "key_1", 0, None))
    assert ring.identify(x_api_key=GOOD).caller is ring.identify(x_api_key=new).caller
    ring.clock.now += 60
    with pytest.raises(InvalidApiKey):
        ring.identify(x_api_key=GOOD)
    assert ring.identify(x_api_key=new)


def test_without_a_key_store_it_is_not_the_caller_who_is_wrong():
    ring = Ring()
    with pytest.raises(LedgerUnavailable):
        ring.identify(x_api_key=GOOD)


def test_an_older_copy_does_not_bring_a_key_back(ring):
    ring.put(disabled=True)
    stale = Key(id="key_1", name="team", generation=1)
    ring.keyring.apply([(stale, [Secret(digest_of(GOOD), "key_1", 0, None)])])
    with pytest.raises(KeyDisabled):
        ring.identify(x_api_key=GOOD)


def test_who_stops_being_valid_is_told(ring):
    told: list[tuple[str, GatewayError]] = []
    ring.keyring.on_revoked = lambda key_id, cause: told.append((key_id, cause))
    ring.put(weight=3)
    assert not told
    ring.put(disabled=True)
    assert [(key, type(cause)) for key, cause in told] == [("key_1", KeyDisabled)]
    told.clear()
    ring.put("key_1", Secret(digest_of(b"sk-new-0123456789"), "key_1", 0, None))
    told.clear()
    # Revoked at once: the running calls can only have used what is gone.
    ring.put("key_1", Secret(digest_of(b"sk-newer-0123456789"), "key_1", 0, None))
    assert [type(cause) for _, cause in told] == [InvalidApiKey]


def test_the_time_of_a_refusal_says_nothing_about_how_much_of_a_key_was_right(ring):
    """Guesses that share nothing, half, or all but one character with a real key take the same time.

    Interleaved, and the quickest of as many as it takes: what other programs on the machine do only ever adds.
    """
    guesses = [b"x" * len(GOOD), GOOD[: len(GOOD) // 2] + b"x" * (len(GOOD) - len(GOOD) // 2), GOOD[:-1] + b"x"]
    headers = [Headers([(b"authorization", b"Bearer " + guess)]) for guess in guesses]
    call = Call("r", ENDPOINTS["/v1/chat/completions"], "ip")

    def once(sent: Headers) -> int:
        began = time.perf_counter_ns()
        for _ in range(100):
            with contextlib.suppress(InvalidApiKey):
                ring.auth.identify(call, sent)
        return time.perf_counter_ns() - began

    quickest = [once(sent) for sent in headers]
    for turn in range(3_000):
        quickest = [min(known, once(sent)) for known, sent in zip(quickest, headers, strict=True)]
        if turn >= 60 and max(quickest) < 1.25 * min(quickest):
            break
    assert max(quickest) < 1.25 * min(quickest)
