"""One CPU appliance for the whole suite, on stand-in images where no registry answers."""

import os
import subprocess
from collections.abc import Iterator

import pytest
from tests.stack.alarms import Alarms
from tests.stack.appliance import NOTES, STANDIN, Appliance, DockerMissing, remove_leftovers, stand_ins, start_docker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What a reader of the result must know, where output is not captured."""
    for note in NOTES:
        terminalreporter.write_line(note)


@pytest.fixture(scope="session")
def docker() -> Iterator[list[str]]:
    """Docker answers and the base images are there; the images that cannot be had."""
    if os.geteuid() != 0 and subprocess.run([STANDIN, "exec", "docker", "version"], capture_output=True).returncode:
        pytest.skip("no Docker Engine answers, and starting a private one needs root")
    try:
        started = start_docker()
        if started:
            remove_leftovers()
        left_out = stand_ins()
    except DockerMissing as missing:
        pytest.skip(f"Docker cannot run here: {missing}")
    if left_out:
        NOTES.append(f"stack: left out, no registry answers and Debian has no package: {' '.join(left_out)}")
    yield left_out
    if started:
        subprocess.run([STANDIN, "stop"], check=True, timeout=300)


@pytest.fixture(scope="module")
def alarms(appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alarms]:
    """The product's alerts in haste, beside the appliance."""
    one = Alarms(appliance, tmp_path_factory.mktemp("alarms"))
    try:
        one.listen()
        yield one
    finally:
        one.remove()


@pytest.fixture(scope="session")
def appliance(docker: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    """The appliance, built from this checkout, serving, with one key."""
    own = tmp_path_factory.mktemp("certificates")  # the operator's own would lie here
    one = Appliance(left_out=docker, settings={"CERTIFICATES_DIR": str(own)})
    try:
        if os.geteuid() == 0:
            one.give_ledger_a_disk(tmp_path_factory.mktemp("disk") / "ledger")
        built = one.build()
        started = one.up()
        NOTES.append(f"stack: images built in {built:.0f} s, serving {started:.0f} s after `up`")
        one.key = str(one.create_key("proof")["secret"])
        yield one
    finally:
        if os.environ.get("KEEP_STACK") != "1":
            one.down()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The ledger's disk is filled first: once its log has been written back it keeps its blocks and is used again from
    its start, so that for hundreds of calls a full disk would not be felt."""
    items.sort(key=lambda item: not item.name.startswith("test_ledger_disk_full"))
