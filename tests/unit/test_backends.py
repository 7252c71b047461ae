"""Which engines there are, what they serve, and when they may be used."""

from __future__ import annotations

import asyncio
import json

import pytest
from tests.doubles.clock import run_virtual, virtual_now
from tests.doubles.flow import healthy, registry, settings

from gateway.backends import Backend, Probe, Registry
from gateway.breaker import BreakerState
from gateway.errors import ModelNotFound, NoBackend

TWO = json.dumps(
    [
        {"name": "one", "url": "http://h1:1/", "models": ["big", "both"], "served_name": "org/big"},
        {"name": "two", "url": "http://h2:1", "models": ["both", "small"], "weight": 3, "api_key": "k"},
    ]
)


def still() -> float:
    return 0.0


def test_aliases_pools_and_served_names() -> None:
    engines = Registry.of(settings(backends=TWO), healthy)
    one, two = engines.backends
    engines.note(one, Probe(True, ("org/big",), 4096))
    engines.note(two, Probe(True, ("org/small",), 2048))

    assert engines.pool("both") == (one, two)
    assert engines.pool("small") == (two,)
    assert engines.served_name(one, "both") == "org/big"
    assert engines.served_name(two, "both") == "org/small", "an alias means the model that the engine has"
    assert engines.max_model_len("both") == 2048
    assert engines.max_model_len("big") == 4096
    assert [entry["id"] for entry in engines.models()] == ["big", "both", "small"]
    assert (one.url, two.api_key, two.weight) == ("http://h1:1", "k", 3)
    with pytest.raises(ModelNotFound):
        engines.pool("nobody")


def test_models_are_found_at_the_engine_and_remembered_while_it_is_down() -> None:
    engines = registry(up=False, clock=still)
    (engine,) = engines.backends
    with pytest.raises(NoBackend):
        engines.pool("m")

    engines.note(engine, Probe(True, ("m", "lora"), 100))
    for _ in range(2):
        engines.note(engine, Probe(False))

    assert engines.pool("lora") == (engine,)
    assert engines.ready() == (False, "no healthy engine")
    with pytest.raises(ModelNotFound):
        engines.pool("other")


def test_health_unknown_is_not_eligible_and_one_slow_poll_is_no_outage() -> None:
    engines = registry(up=False, clock=still)
    (engine,) = engines.backends
    assert not engine.available(0.0)

    states = []
    for ok in (True, False, True, False, False, True):
        engines.note(engine, Probe(ok, ("m",)))
        states.append(engine.available(0.0))

    assert states == [True, True, True, True, False, True]


def test_results_open_the_breaker_and_a_restart_closes_it() -> None:
    changes: list[str] = []
    engines = registry(clock=still, breaker_failures=3)
    engines.on_change = lambda: changes.append("change")
    (engine,) = engines.backends

    for _ in range(3):
        engines.report(engine, False)
    assert engines.breaker_states() == {"vllm": BreakerState.OPEN}
    assert engines.ready() == (False, "engine failing")
    assert 0 < engines.seconds_to_recovery((engine,)) <= 5
    for ok in (False, False, True):
        engines.note(engine, Probe(ok, ("m",)))

    assert engines.ready() == (True, "")
    assert changes == ["change"]


def test_an_open_breaker_wakes_those_who_wait_when_a_probe_is_due() -> None:
    async def main() -> tuple[float, list[float]]:
        woken: list[float] = []
        engines = registry(breaker_failures=1, breaker_seconds=4)
        engines.on_change = lambda: woken.append(virtual_now())
        engines.report(engines.backends[0], False)
        await asyncio.sleep(10)
        return virtual_now(), woken

    _, woken = run_virtual(main())
    assert woken == [pytest.approx(4.0, abs=0.01)]


def test_polling_hurries_after_a_failure_and_survives_a_broken_probe() -> None:
    polled: list[float] = []

    async def probe(_: Backend) -> Probe:
        polled.append(virtual_now())
        if 5 < virtual_now() < 6:
            raise RuntimeError("boom")
        return Probe(True, ("m",), 10)

    async def main() -> list[bool]:
        engines = Registry.of(settings(health_seconds=2), probe)
        engines.clock = virtual_now
        engines.start()
        seen = []
        for wait in (0.1, 5.0, 0.8, 2.5):
            await asyncio.sleep(wait)
            seen.append(engines.ready()[0])
            if wait == 5.0:
                engines.report(engines.backends[0], False)  # at 5.1: polls at once, not at 6.0
        await engines.close()
        return seen

    assert run_virtual(main()) == [True, True, False, True]
    assert sum(5.0 < at < 6.0 for at in polled) >= 2
    assert len([at for at in polled if at < 5.0]) == 3, "at its leisure while all is well"
