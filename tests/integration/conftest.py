"""What most tests of the gateway stand on; a test file with other wishes has fixtures of its own by these names."""

from collections.abc import Iterator

import pytest
from tests.doubles.gateway import GatewayProcess
from tests.doubles.vllm import VllmDouble


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmDouble]:
    """A double of vLLM."""
    with VllmDouble() as double:
        yield double


@pytest.fixture(scope="module")
def gateway(engine: VllmDouble) -> Iterator[GatewayProcess]:
    """A gateway in front of it."""
    with GatewayProcess(VLLM_URL=engine.url) as running:
        yield running
