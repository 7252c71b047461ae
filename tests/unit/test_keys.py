"""What an operator may set, and the command line that sets it."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import cli_keys
from gateway.call import Limits, Priority
from gateway.errors import InvalidRequest
from gateway.keys import LIMIT_NAMES, Key, decode_fields, digest_of, expiry, new_secret
from gateway.settings import load


def body(**fields) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (body(), "name"),
        (body(name=""), "name"),
        (body(name="a\nb"), "name"),
        (body(name="a", daily_tokens=-1), "daily_tokens"),
        (body(name="a", priority="urgent"), "priority"),
        (body(name="a", weight=0), "weight"),
        (body(name="a", models=[]), "models"),
        (body(name="a", expires_at="tomorrow"), "expires_at"),
        (body(name="a", expires_at="2030-01-01T00:00:00"), "expires_at"),
        (body(name="a", expires_at=-5), "expires_at"),
        (body(name="a", daily_token=5), "daily_token"),
        (body(name="a", daily_tokens="5"), "daily_tokens"),
        (body(name="a", daily_tokens=True), "daily_tokens"),
        (body(name="a", disabled=True), "disabled"),
        (body(name="a", models=[1]), "models"),
        (body(name="a", models=["a\x1b[31m"]), "models"),
        (b"[]", None),
        (b'{"name": "a"', None),
        (b"\xff", None),
        (b"[" * 100_000, None),
    ],
)
def test_what_cannot_be_used_is_refused(raw, param):
    with pytest.raises(InvalidRequest) as refusal:
        decode_fields(raw, creating=True)
    assert refusal.value.param == param


def test_missing_null_and_zero_are_three_things():
    assert decode_fields(b"{}") == {}
    assert decode_fields(body(daily_tokens=None, concurrency=0)) == {"daily_tokens": None, "concurrency": 0}
    settings = load({"DEFAULT_DAILY_TOKENS": "100", "DEFAULT_CONCURRENCY": "5"})
    key = Key(id="k", name="n", limits={"daily_tokens": None, "concurrency": 0, "requests_per_minute": 7})
    assert key.caller(settings).limits == Limits(
        requests_per_minute=7, tokens_per_minute=0, concurrency=0, daily_tokens=100, max_tokens=0
    )
    assert key.caller(settings).priority is Priority.NORMAL


def test_times():
    assert expiry("2030-01-01T00:00:00Z") == expiry("2030-01-01T01:00:00+01:00") == 1893456000.0
    assert expiry(1893456000) == 1893456000.0
    assert expiry(None) is None
    assert expiry(0) is None
    with pytest.raises(InvalidRequest):
        expiry(float("nan"))


WORDS = st.text("ab,-\n\u00e9\x00", max_size=10)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.lists(WORDS, max_size=3)
NAMES = st.sampled_from([*LIMIT_NAMES, "weight", "expires_at", "models", "name"])


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_any_body_is_either_used_or_refused(fields):
    try:
        changes = decode_fields(json.dumps(fields).encode())
    except InvalidRequest:
        return
    assert set(changes) == set(fields)
    msgspec.json.encode(changes)


def test_secrets_are_long_recognisable_and_never_the_same():
    made = {new_secret() for _ in range(1000)}
    assert len(made) == 1000
    assert all(secret.startswith("sk-gw-") and len(secret) >= 6 + 32 for secret in made)
    secret = made.pop()
    assert digest_of(secret) == digest_of(secret.encode())


class TestCommandLine:
    @pytest.fixture
    def gateway(self, tmp_path, capsys):
        settings = load({"DATABASE_URL": f"sqlite:///{tmp_path}/g.sqlite3"})

        def run(*argv: str, status: int = 0):
            capsys.readouterr()
            assert cli_keys.run([*argv, "--json"], settings) == status
            return json.loads(capsys.readouterr().out)

        run.settings = settings
        return run

    def test_a_keys_life(self, gateway, capsys):
        made = gateway("create", "--name", "team", "--daily-tokens", "1000", "--models", "a,b", "--organisation", "lab")
        assert made["secret"].startswith("sk-gw-")
        assert (made["daily_tokens"], made["models"], made["organisation"]) == (1000, ["a", "b"], "lab")
        assert made["requests_per_minute"] is None
        key_id = made["id"]
        changed = gateway("limit", key_id, "--daily-tokens", "0", "--priority", "low", "--models", "all")
        assert (changed["daily_tokens"], changed["priority"], changed["models"]) == (0, "low", None)
        assert changed["organisation"] == "lab"
        assert gateway("limit", key_id, "--daily-tokens", "default")["daily_tokens"] is None
        assert gateway("disable", key_id)["disabled"] is True
        assert gateway("enable", key_id)["disabled"] is False
        rotated = gateway("rotate", key_id, "--grace-seconds", "60")
        assert rotated["id"] == key_id
        assert rotated["secret"] != made["secret"]
        assert gateway("organisation", "lab", "--daily-tokens", "5000")["daily_tokens"] == 5000
        assert gateway("organisations") == {"data": [{"name": "lab", "daily_tokens": 5000, "keys": 1}]}
        listed = gateway("list")
        assert [key["id"] for key in listed["data"]] == [key_id]
        assert "secret" not in listed["data"][0]
        shown = gateway("show", key_id)
        assert shown.pop("usage")["used_tokens"] == 0
        assert shown == listed["data"][0]
        assert gateway("delete", key_id) == {"id": key_id, "deleted": True}
        assert gateway("show", key_id, status=1)["error"]["code"] == "key_not_found"
        assert cli_keys.run(["list"], gateway.settings) == 0
        assert "(none)" in capsys.readouterr().out
        assert cli_keys.run(["audit"], gateway.settings) == 0
        told = capsys.readouterr().out
        assert "key_rotated" in told
        assert made["secret"] not in told
        assert rotated["secret"] not in told

    def test_wrong_use_is_told(self, gateway, capsys):
        assert gateway("create", "--name", "x", "--weight", "0", status=1)["error"]["param"] == "weight"
        for argv in (["create"], ["limit", "k", "--daily-tokens", "-1"], ["nothing"], []):
            with pytest.raises(SystemExit) as end:
                cli_keys.run(argv, gateway.settings)
            assert end.value.code == 2
        broken = load({"DATABASE_URL": "sqlite:////no/such/folder/g.sqlite3"})
        capsys.readouterr()
        assert cli_keys.run(["list"], broken) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_a_change_of_nothing_is_wrong_use(self, gateway, capsys):
        key_id = gateway("create", "--name", "x")["id"]
        with pytest.raises(SystemExit) as end:
            cli_keys.run(["limit", key_id], gateway.settings)
        assert end.value.code == 2
        assert "--daily-tokens" in capsys.readouterr().err
        assert [row["action"] for row in gateway("audit")["data"]] == ["key_created"]

    @pytest.mark.parametrize("option", ["--models", "--name", "--organisation", "--expires-at"])
    def test_bytes_that_are_no_text_are_refused(self, gateway, option):
        """As the shell hands them over."""
        key_id = gateway("create", "--name", "x")["id"]
        assert gateway("limit", key_id, option, "\udcff", status=1)["error"]["code"] == "invalid_request"
        assert gateway("show", "\udcff", status=1)["error"]["code"] == "key_not_found"
