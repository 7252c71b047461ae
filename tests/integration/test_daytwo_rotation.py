"""`make rotate-secrets`: the new secrets are in use when it ends, or the old ones are; never half of each."""

import time
from pathlib import Path

import pytest
from tests.doubles.daytwo_site import Site, container

SECRETS = {
    "gateway-secrets/vllm_api_key": "old-engine",
    "gateway-secrets/gateway_admin_key": "old-admin",
    "engine-secrets/vllm_api_key": "old-engine",
    "grafana-secrets/admin_password": "old-password",
}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An appliance that runs on secrets of its own making."""
    site = Site(tmp_path)
    for name, secret in SECRETS.items():
        folder, _, file = name.partition("/")
        (site.volume(folder) / file).write_text(secret)
    site.has("containers.json", [container("gateway"), container("vllm"), container("grafana")])
    return site


def kept(site: Site) -> dict[str, str]:
    """The secrets that a restart would read."""
    return {name: (site.volume(name.partition("/")[0]) / name.partition("/")[2]).read_text() for name in SECRETS}


def restarted(site: Site) -> list[str]:
    """Services that were restarted, in order."""
    return [call["words"][-1] for call in site.calls() if "restart" in call["words"]]


def test_every_secret_is_new_and_taken_up(site: Site) -> None:
    before = time.time()
    told = site.verb("rotate-secrets")
    assert told.endswith("status 0"), told
    now = kept(site)
    assert all(now[name] != old for name, old in SECRETS.items())
    assert now["gateway-secrets/vllm_api_key"] == now["engine-secrets/vllm_api_key"]
    assert restarted(site) == ["vllm", "gateway"]
    assert "reset-admin-password" in site.calls()[-1]["words"]
    # By its time `make up` finds who has not read it yet, as after a power failure in the middle.
    assert (site.volume("engine-secrets") / "vllm_api_key").stat().st_mtime >= before


@pytest.mark.parametrize(
    "interruption",
    ["SIGINT restart --no-deps vllm", "SIGTERM restart --no-deps gateway", "SIGHUP reset-admin-password"],
)
def test_an_interruption_brings_the_old_ones_back_into_use(site: Site, interruption: str) -> None:
    site.has("interrupt", interruption)
    told = site.verb("rotate-secrets")
    assert told.endswith("error: the old secrets are back in use: interrupted\nstatus 1"), told
    assert kept(site) == SECRETS
    assert restarted(site)[-2:] == ["vllm", "gateway"]


def test_secrets_of_the_operator_are_changed_where_they_stand(site: Site) -> None:
    (site.checkout / ".env").write_text("VLLM_API_KEY=mine\n")
    told = site.verb("rotate-secrets")
    assert "VLLM_API_KEY is set in .env or the environment: change it there, then `make up`\nstatus 1" in told
    assert kept(site) == SECRETS
    assert restarted(site) == []
