"""The rate over all NVLinks tells of bytes that were moved, not of links that come and go."""

from __future__ import annotations

import pytest

from gpu_exporter.links import LinkRates
from gpu_exporter.readings import Driver, Gpu, Identity, Reading, Sample

LIFETIME, SPEED, LINKS = 4e17, 5e9, 18  # bytes that a link moved before, and in each second
ALL = frozenset(range(LINKS))


class Machine:
    """One GPU, sampled every five seconds."""

    def __init__(self) -> None:
        self.now, self.lost = 0.0, dict.fromkeys(ALL, 0.0)
        self.rates = LinkRates(lambda: self.now)

    def sample(self, links: frozenset[int] = ALL) -> list[float]:
        self.now += 5
        rows: list[Reading] = [(LIFETIME + SPEED * self.now - self.lost[link], (str(link),)) for link in sorted(links)]
        readings = {"nvlink_transmitted": rows, "nvlink_received": rows} if links else {}
        (gpu,) = self.rates.added(Sample(Driver(), (Gpu(Identity(0, "GPU-1"), readings),))).gpus
        return [value for value, _ in gpu.readings.get("nvlink_data_rate", ())]


FULL = [pytest.approx(2 * LINKS * SPEED, rel=1e-6)]


def test_the_rate_is_that_of_all_links_in_both_directions() -> None:
    machine = Machine()
    assert machine.sample() == []
    assert machine.sample() == FULL
    assert machine.sample() == FULL


def test_a_link_that_one_sample_lacks_gives_no_absurd_rate() -> None:
    machine = Machine()
    machine.sample()
    assert machine.sample(ALL - {3}) == machine.sample() == []
    assert machine.sample() == FULL


def test_a_sample_without_links_is_bridged() -> None:
    machine = Machine()
    machine.sample()
    assert machine.sample(frozenset()) == []
    assert machine.sample() == FULL


def test_a_link_that_stays_away_leaves_the_rate_of_the_others() -> None:
    machine = Machine()
    machine.sample()
    machine.sample(ALL - {3})
    assert machine.sample(ALL - {3}) == [pytest.approx(2 * (LINKS - 1) * SPEED, rel=1e-6)]


def test_a_link_that_counts_anew_gives_no_rate_once() -> None:
    machine = Machine()
    machine.sample()
    machine.lost[3] = 1e11  # less than the others moved meanwhile
    assert machine.sample() == []
    assert machine.sample() == FULL
