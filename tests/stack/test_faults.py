"""The worst days, on the real stack, under load. Four always run; the others run with `make test-long`.

Times promised here are promises of docs/reliability.md; the measured ones are kept there. Each test names the alert that
must fire because of its fault, or says why none does.
"""

import os
import time

import pytest
from tests.stack import harm
from tests.stack.alarms import Alarms
from tests.stack.appliance import Appliance
from tests.stack.load import Load
from tests.stack.proof import Proof, inflict
from tests.stack.waiting import until

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.skipif(os.geteuid() != 0, reason="killing a container's processes behind Docker's back needs root"),
]
ENGINE_START = 420  # seconds that the CPU engine may take to start on two busy cores; 45 when they are idle
PROGRAM_START = (
    45  # seconds for any other container: Docker's wait, and a start on two busy cores; 5 when they are idle
)
LASTS = 8.0  # seconds a passing fault stays: longer than a health interval, shorter than a caller's patience


def a_failure(load: Load) -> None:
    """The fault is felt: a call that began after it failed, or one under way broke."""
    began = time.monotonic()
    until("the fault is felt", lambda: [c for c in list(load.calls) if c.ended > began and not c.whole], 60)


def silence(load: Load) -> None:
    """Nobody has been answered for a while."""

    def silent() -> bool:
        ends = [call.ended for call in list(load.calls) if call.ended and call.whole]
        return time.monotonic() - max(ends, default=0) > LASTS

    until("callers are answered no more", silent, 60)


def needs_our_docker() -> None:
    """Leaves the test out where Docker is the machine's own."""
    if not harm.engine_is_ours():
        pytest.skip("this breaks Docker's daemon, and the machine's own is not ours to break")


def test_gateway_killed(appliance: Appliance, alarms: Alarms) -> None:
    proof = inflict(
        appliance, alarms, "gateway: kill -9", lambda: harm.kill(appliance, "gateway"),
        within=PROGRAM_START, alert="CallsLost/gateway", harm_is_felt=a_failure,
    )  # fmt: skip
    assert proof.in_flight > 0
    until("Alertmanager has heard it", lambda: alarms.told("CallsLost/gateway"), 60)


def test_engine_killed(appliance: Appliance, alarms: Alarms) -> None:
    proof = inflict(
        appliance, alarms, "engine: kill -9", lambda: harm.kill(appliance, "vllm"),
        within=ENGINE_START, alert="BackendDown/gateway", harm_is_felt=a_failure,
    )  # fmt: skip
    assert proof.refused > 0, "callers must be told early and honestly while the engine is away"


@pytest.mark.parametrize(
    "log", ["", pytest.param(", its log used again", marks=pytest.mark.long)], ids=["log-new", "log-used-again"]
)
def test_ledger_disk_full(appliance: Appliance, alarms: Alarms, log: str) -> None:
    """No call is admitted that could not be booked; what was answered before is booked after.

    Once SQLite's log has been written back it keeps its blocks and is used again from its start: then calls go on, and
    are booked, until it has to grow.
    """
    if not appliance.disk:
        pytest.skip("this machine has no loop device for a small disk, and its own is not ours to fill")
    if log:
        harm.use_log(appliance)
    try:
        inflict(
            appliance, alarms, f"ledger's disk: full{log}", lambda: harm.fill(appliance, "gateway-data"),
            lambda: harm.free(appliance, "gateway-data"),
            within=PROGRAM_START, alert="LedgerUnavailable/gateway", harm_is_felt=lambda load: ledger_refuses(appliance, load),
        )  # fmt: skip
    finally:
        harm.free(appliance, "gateway-data")


def ledger_refuses(appliance: Appliance, load: Load) -> None:
    """The fault is felt: nothing is admitted, and callers are told. Calls for a model that nobody has are booked too, and
    cost no engine."""

    def refuses() -> bool:
        nobody = {"model": "nobody", "messages": [{"role": "user", "content": "?"}]}
        assert appliance.edge.call("POST", "/v1/chat/completions", nobody).status in (404, 503)
        return appliance.edge.call("GET", "/ready", seconds=5).status == 503

    until("the ledger refuses", refuses, 600, every=0.1)
    a_failure(load)


@pytest.mark.parametrize(
    "service", [pytest.param("gateway"), pytest.param("vllm", marks=pytest.mark.long)]
)  # fmt: skip
def test_container_paused(appliance: Appliance, alarms: Alarms, service: str) -> None:
    proof = inflict(
        appliance, alarms, f"{service}: paused",
        lambda: appliance.docker("pause", appliance.container(service)),
        lambda: appliance.docker("unpause", appliance.container(service)),
        within=PROGRAM_START, alert=f"TargetDown/{service}", harm_is_felt=silence,
    )  # fmt: skip
    assert proof.lost == 0, "a pause shorter than every deadline loses nothing"


OTHERS = {  # the alert, or why none speaks
    "nginx": ("TargetDown/nginx", ""),
    "gpu-exporter": ("TargetDown/gpu", ""),
    "prometheus": ("", "it is the one that would tell"),
    "alertmanager": ("TargetDown/alertmanager", ""),
    "certificate-keeper": ("", "what it keeps is watched (CertificateNearEnd)"),
}


@pytest.mark.long
@pytest.mark.parametrize("service", OTHERS)
def test_other_container_killed(appliance: Appliance, alarms: Alarms, service: str) -> None:
    alert, no_alert = OTHERS[service]
    proof = inflict(
        appliance, alarms, f"{service}: kill -9", lambda: harm.kill(appliance, service),
        within=PROGRAM_START, alert=alert, no_alert=no_alert,
    )  # fmt: skip
    if service != "nginx":
        assert proof.lost == 0, f"{service} is not in a call's path"
    until(f"{service} runs again", lambda: appliance.inspect(service)["State"]["Running"], 60)  # type: ignore[index]


RESTARTED = {  # as they are killed, but for
    **OTHERS,
    "gateway": ("TargetDown/gateway", ""),
    "alertmanager": ("", "it is back within a second, and nobody is paged for that"),
}


@pytest.mark.long
@pytest.mark.parametrize("service", RESTARTED)
def test_container_restarted(appliance: Appliance, alarms: Alarms, service: str) -> None:
    """`docker restart`: told to go, it ends what it has begun."""
    alert, no_alert = RESTARTED[service]
    proof = inflict(
        appliance, alarms, f"{service}: docker restart",
        lambda: appliance.docker("restart", appliance.container(service)),
        within=PROGRAM_START, alert=alert, no_alert=no_alert,
    )  # fmt: skip
    assert proof.lost == 0, f"{proof.lost} calls were lost although {service} was asked to leave"


@pytest.mark.long
def test_engine_restarted(appliance: Appliance, alarms: Alarms) -> None:
    """The engine's container is restarted: callers are told early, and whoever cannot be served to the end knows it."""
    proof = inflict(
        appliance, alarms, "vllm: docker restart",
        lambda: appliance.docker("restart", appliance.container("vllm")),
        within=ENGINE_START, alert="BackendDown/gateway", harm_is_felt=a_failure,
    )  # fmt: skip
    assert proof.refused > 0, "callers must be told early and honestly while the engine is away"


CUTS = {
    ("vllm", "engine"): ("BackendDown/gateway", ""),
    ("gateway", "edge"): ("", "EdgeErrors is made from nginx's log, whose shipper nothing stands in for here"),
    ("prometheus", "monitoring"): ("", "it is the one that would tell"),
}


@pytest.mark.long
@pytest.mark.parametrize(("service", "network"), CUTS)
def test_network_cut(appliance: Appliance, alarms: Alarms, service: str, network: str) -> None:
    alert, no_alert = CUTS[service, network]
    proof = inflict(
        appliance, alarms, f"network between {service} and {network}: cut",
        lambda: harm.cut(appliance, service, network),
        lambda: harm.join(appliance, service, network),
        within=60, alert=alert, no_alert=no_alert, harm_is_felt=None if service == "prometheus" else silence,
    )  # fmt: skip
    if service == "prometheus":
        assert proof.lost == 0


@pytest.mark.long
def test_engine_out_of_memory(appliance: Appliance, alarms: Alarms) -> None:
    inflict(
        appliance, alarms, "engine: out of memory", lambda: harm.starve(appliance, "vllm"),
        within=ENGINE_START, alert="BackendDown/gateway", harm_is_felt=a_failure,
    )  # fmt: skip


@pytest.mark.long
def test_docker_restarted(appliance: Appliance, alarms: Alarms) -> None:
    needs_our_docker()
    inflict(
        appliance, alarms, "Docker: daemon restart", harm.restart_docker,
        within=ENGINE_START + 60, alert="BackendDown/gateway", harm_is_felt=a_failure,
    )  # fmt: skip


@pytest.mark.long
def test_power_cut(appliance: Appliance, alarms: Alarms) -> None:
    needs_our_docker()
    proof: Proof = inflict(
        appliance, alarms, "power: cut", lambda: harm.cut_power(appliance),
        within=ENGINE_START + 60, alert="BackendDown/gateway", harm_is_felt=a_failure,
    )  # fmt: skip
    assert proof.in_flight > 0
