"""Configuration: every problem at once, secrets by file and never shown, unknown names refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import SECRETS, ConfigurationError, Settings, load, split_keys


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as refusal:
        load(environ)
    return refusal.value.problems


def test_nothing_has_to_be_set():
    settings = load({})

    assert (settings.gateway_host, settings.gateway_port, settings.drain_seconds) == ("127.0.0.1", 8080, 30)
    assert [backend.name for backend in settings.backend_configs] == ["vllm"]


def test_an_empty_variable_is_not_set():
    assert load({"GATEWAY_PORT": "", "GATEWAY_ADMIN_KEY": " "}) == load({})


def test_all_problems_are_told_at_once_with_their_names():
    found = problems(GATEWAY_PORT="x", QUEUE_SECONDS="-1", DATABASE_URL="mysql://x", GATEWAY_WORKERS="4")

    assert len(found) == 4
    for name in ("GATEWAY_PORT", "QUEUE_SECONDS", "DATABASE_URL", "GATEWAY_WORKERS"):
        assert any(line.startswith(f"{name}: ") for line in found), name


def test_an_unknown_name_is_refused_with_the_nearest_one():
    assert problems(GATEWAY_HSOT="x") == ["GATEWAY_HSOT: no such setting; did you mean GATEWAY_HOST?"]
    load({"GATEWAY_MEMORY": "4g"})  # Compose's own


@pytest.mark.parametrize(("name", "meant"), [("VLLM_ULR", "VLLM_URL"), ("VLLM_APIKEY", "VLLM_API_KEY")])
def test_a_name_of_the_engines_is_refused_where_it_looks_like_one_of_ours(name: str, meant: str):
    assert problems(**{name: "x"}) == [f"{name}: no such setting; did you mean {meant}?"]
    load({"VLLM_LOGGING_LEVEL": "INFO", "VLLM_HOST": "127.0.0.1", "VLLM_PORT": "8000", "VLLM_EXTRA_ARGS": "--x"})


def test_a_log_level_may_be_written_small():
    assert load({"LOG_LEVEL": "debug"}).log_level == "DEBUG"


@pytest.mark.parametrize(("name", "value", "shown"), [
    ("VLLM_URL", "http://user:hunter2@vllm:8000", "http://********@vllm:8000"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@jaeger:4318/x", "http://********@jaeger:4318/x"),
    ("GPU_EXPORTER_URL", "http://hunter2@gpu:9101", "http://********@gpu:9101"),
    ("DATABASE_URL", "postgresql://u:hunt@er2@db/x", "postgresql://********@db/x"),
    ("DATABASE_URL", "postgresql://db/x?user=u&password=hunter2", "postgresql://db/x?user=u&password=********"),
    ("DATABASE_URL", "sqlite:////data/gateway.sqlite3", "sqlite:////data/gateway.sqlite3"),
])  # fmt: skip
def test_what_is_secret_in_an_address_is_not_shown(name: str, value: str, shown: str):
    assert load({name: value}).hidden()[name] == shown


def test_what_is_secret_in_the_address_of_a_backend_is_not_shown():
    backends = load({"BACKENDS": '[{"name":"a","url":"http://u:hunter2@x:8000"}]'}).hidden()["BACKENDS"]

    assert backends[0]["url"] == "http://********@x:8000"


@pytest.mark.parametrize(("name", "value"), [
    ("VLLM_URL", "ftp://x"), ("VLLM_URL", "x"), ("TRUSTED_PROXIES", "10.0.0.0/99"), ("QUOTA_TIMEZONE", "Mars/Base"),
    ("QUOTA_TIMEZONE", "../../etc/passwd"), ("QUEUE_SECONDS", "inf"), ("DRAIN_SECONDS", "nan"),
    ("LOG_LEVEL", "LOUD"), ("BACKENDS", "[]"), ("BACKENDS", "{"),
    ("BACKENDS", '[{"name":"a","url":"http://x"},{"name":"a","url":"http://y"}]'),
    ("BACKENDS", '[{"name":"a","url":"http://x","typo":1}]'), ("BACKENDS", '[{"name":"a","url":"unix:/x"}]'),
    ("GATEWAY_ADMIN_KEY", "changeme"), ("GATEWAY_API_KEYS", "good-enough-secret,password"), ("KEEP_ALIVE_SECONDS", "500"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_before_anything_starts(name: str, value: str):
    found = problems(**{name: value})

    assert len(found) == 1
    assert name in found[0]
    assert name.lower() not in SECRETS or value not in found[0]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_comes_by_file_and_is_not_shown(name: str, tmp_path: Path):
    secret = {
        "database_url": "postgresql://user:hunter2hunter2@db/x",
        "backends": '[{"name":"a","url":"http://x","api_key":"hunter2hunter2"}]',
    }.get(name, "hunter2hunter2")
    file = tmp_path / "secret"
    file.write_text(secret + "\n")

    settings = load({f"{name.upper()}_FILE": str(file)})

    assert getattr(settings, name) is not None
    assert "hunter2" not in repr(settings.hidden()) + repr(settings) or name in ("database_url", "backends")
    assert "hunter2" not in repr(settings.hidden())


@pytest.mark.parametrize(("value", "keys"), [
    ("a", [(None, "a")]), ("a,b", [(None, "a"), (None, "b")]), ("team=s", [("team", "s")]), (" , x ,", [(None, "x")]),
    ("YWJj==", [(None, "YWJj==")]), ("team=YWJj==", [("team", "YWJj==")]), ("=x", [(None, "=x")]),
])  # fmt: skip
def test_keys_from_the_environment_may_have_names(value: str, keys: list[tuple[str | None, str]]):
    assert split_keys(value) == keys


def test_a_secret_given_twice_or_unreadable_is_refused(tmp_path: Path):
    file = tmp_path / "secret"
    file.write_text("some-secret-1")

    assert "keep one" in problems(VLLM_API_KEY="some-secret-2", VLLM_API_KEY_FILE=str(file))[0]
    assert "cannot read" in problems(VLLM_API_KEY_FILE=str(tmp_path / "none"))[0]


@given(
    st.dictionaries(st.sampled_from([name.upper() for name in Settings.model_fields]), st.text(max_size=30), max_size=6)
)
def test_any_environment_is_either_used_or_explained(environ: dict[str, str]):
    found: list[str] = []
    try:
        load(environ)
    except ConfigurationError as error:
        found = [*error.problems, ""]
    assert all(line.strip() for line in found[:-1])
    assert len(found) != 1, "a refusal names at least one problem"
