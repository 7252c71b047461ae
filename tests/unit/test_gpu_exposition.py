"""The page is what Prometheus reads."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gpu_exporter.exposition import Series, labels, number, render

NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True).filter(lambda n: not n.startswith("__"))
VALUE = st.floats(min_value=-1e18, max_value=1e18, allow_nan=False)
# The reference parser splits lines as str.splitlines does, so it cannot be asked about other line separators.
TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"])) | st.sampled_from(
    ["a\nb", 'a"b', "a\\b", "\\n"]
)


@given(st.dictionaries(NAME, TEXT, min_size=1, max_size=4), VALUE)
def test_what_is_written_is_what_is_read(pairs: dict[str, str], value: float) -> None:
    page = render([Series("gpu_thing", "gauge", "A thing.", [(labels(pairs.items()), value)])])
    (family,) = text_string_to_metric_families(page)
    (sample,) = family.samples

    assert (family.name, family.type, family.documentation) == ("gpu_thing", "gauge", "A thing.")
    assert sample.labels == pairs
    assert math.isclose(sample.value, value, rel_tol=1e-11, abs_tol=1e-300)


def test_families_without_rows_are_left_out() -> None:
    assert render([Series("gpu_thing", "gauge", "A thing.", [])]) == ""


def test_whole_numbers_are_written_in_full() -> None:
    assert number(9007199254740991.0) == "9007199254740991"
    assert number(305120 * 1e-3) == "305.12"
    assert number(0.1 + 0.2) == "0.3"
