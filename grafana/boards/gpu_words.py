"""How queries about GPUs are said: the chosen GPUs, under short names."""

from grafana.panels import Query

GPU = 'gpu=~"$gpu"'
RATE = "[$__rate_interval]"
NAME = "GPU {{gpu}}"


def by(*labels: str) -> str:
    """A legend of the GPU and further labels."""
    return " ".join([NAME, *(f"{{{{{label}}}}}" for label in labels)])


def one(family: str, legend: str = NAME) -> Query:
    """A gauge of the chosen GPUs."""
    return Query(f"{family}{{{GPU}}}", legend)


def rate(family: str, legend: str = NAME) -> Query:
    """A counter of the chosen GPUs, per second."""
    return Query(f"rate({family}{{{GPU}}}{RATE})", legend)


def several(*families: tuple[str, str]) -> tuple[Query, ...]:
    """Gauges of the chosen GPUs under short names."""
    return tuple(one(family, f"{NAME} {name}") for family, name in families)
