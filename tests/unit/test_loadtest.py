"""The report of a load test: numbers from records, one HTML file, runs compared; bad input is one clear line."""

import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts/loadtest.d"))
import measure  # noqa: E402 # a script's folder, not a package
import plots  # noqa: E402
import report  # noqa: E402

LEVELS = {"first_token": 2.5, "inter_token": 0.1}


def record(start: float, first: float | None, gap: float | None, seconds: float, **more: Any) -> dict[str, Any]:
    """One line of the generator; times in seconds."""
    metrics = {"usage_prompt_tokens": {"value": 10}, "usage_completion_tokens": {"value": 20}}
    if first is not None:
        metrics["time_to_first_token"] = {"value": first * 1000, "unit": "ms"}
    if gap is not None:
        metrics["inter_token_latency"] = {"value": gap * 1000, "unit": "ms"}
    begin = 1_800_000_000_000_000_000 + round(start * 1e9)
    meta = {"request_start_ns": begin, "request_end_ns": begin + round(seconds * 1e9), "was_cancelled": False}
    return {"metadata": {**meta, **more.pop("metadata", {})}, "metrics": metrics, **more}


def result(folder: Path, *records: dict[str, Any]) -> measure.Result:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return measure.read(path, LEVELS)


RUN = {
    "when": "2026-11-23T08-00-00Z",
    "url": "https://127.0.0.1:8443",
    "kind": {"model": "<m>", "concurrency": 8, "rate": None, "max_tokens": 128, "prompts": "abc"},
    "levels": LEVELS,
}


def test_numbers(tmp_path: Path) -> None:
    good = [record(number, 0.5, 0.02, 1.0) for number in range(8)]
    slow = record(8, 3.0, 0.02, 4.0)
    stutter = record(8, 0.5, 0.2, 2.0)
    failed = record(9, None, None, 0.5, error={"code": 503, "type": "Service Unavailable"})
    cut = record(9, 0.5, None, 1.0, metadata={"was_cancelled": True})
    summary = result(tmp_path, *good, slow, stutter, failed, cut).summary
    assert (summary["calls"], summary["errors"]) == (12, 2)
    assert summary["error_kinds"] == {"503 Service Unavailable": 1, "cut off at the end of the run": 1}
    assert summary["seconds"] == pytest.approx(12)
    assert summary["calls_per_second"] == pytest.approx(10 / 12)
    assert summary["goodput_share"] == pytest.approx(8 / 12), "the slow and the stuttering call are answered, not good"
    assert summary["first_token_p50_seconds"] == pytest.approx(0.5)
    assert summary["first_token_p99_seconds"] == pytest.approx(3.0)
    assert summary["inter_token_p99_seconds"] == pytest.approx(0.2)
    assert summary["completion_tokens_per_second"] == pytest.approx(200 / 12)


def test_no_record_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="recorded no call"):
        measure.read(tmp_path / "missing.jsonl", LEVELS)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.sampled_from([1, 50, 90, 95, 99, 100]))
def test_a_quantile_is_one_of_the_values_and_that_many_are_not_above_it(values: list[float], percent: float) -> None:
    found = measure.quantile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values)


def test_tokens_over_time_are_all_tokens(tmp_path: Path) -> None:
    run = result(tmp_path, *(record(number * 0.37, 0.2, 0.05, 1.3) for number in range(20)))
    width = run.seconds / 30
    assert sum(rate * width for _, rate in measure.rate(run.samples, run.seconds)) == pytest.approx(400, rel=0.01)
    assert max(calls for _, calls in measure.running(run.samples, run.seconds)) == 4


class Reader(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_the_report_is_one_file_that_loads_nothing_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    run = result(tmp_path, record(0, 0.5, 0.02, 1), record(1, None, None, 1, error={"type": "<script>"}))
    page = report.page({**RUN, "summary": run.summary}, run, [])
    reader = Reader()
    reader.feed(page)
    assert reader.loaded == []
    assert "<script" not in page
    assert "&lt;m&gt;" in page
    assert page.count("<svg") == 5
    assert "Goodput 50.0%" in " ".join(reader.text.split())
    assert "nan" not in page.lower().replace("nano", "")


def test_a_run_without_a_good_answer_still_has_a_report(tmp_path: Path) -> None:
    run = result(tmp_path, record(0, None, None, 0.1, error={"type": "ClientConnectorError"}))
    page = report.page({**RUN, "summary": run.summary}, run, [])
    assert "ClientConnectorError" in page
    assert any("–" in line for line in report.lines(run.summary))


def test_runs_of_one_kind_are_compared_and_others_are_not(tmp_path: Path) -> None:
    before = result(tmp_path, *(record(number, 0.4, 0.02, 1) for number in range(4))).summary
    now = result(tmp_path, *(record(number, 0.5, 0.02, 1) for number in range(4)))
    history = tmp_path / "results.jsonl"
    other = {**RUN, "when": "b", "summary": before, "kind": {**RUN["kind"], "concurrency": 64}}
    same = {**RUN, "when": "a", "summary": before}
    run = {**RUN, "summary": now.summary}
    history.write_text("".join(json.dumps(one) + "\n" for one in (other, same, run)))
    earlier = report.comparable(history, run)
    assert [one["when"] for one in earlier] == ["a"]
    assert "500 ms (+25%)" in report.page(run, now, earlier)


def test_axes_hold_their_values() -> None:
    svg = plots.Plot("t", "x", "y", 10, 3.3).line([(0, 0), (10, 3.3)]).level(2.5, "limit").svg
    assert "limit" in svg
    assert ">4<" in svg, "the axis ends above the largest value"
    assert plots.number(math.inf) == "–"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"API_KEY": "sk-00000000", "URL": "http://127.0.0.1:9"}, "does not answer"),
        ({"URL": "http://127.0.0.1:9", "API_KEY": "k", "CA_FILE": "/missing.pem"}, "CA_FILE"),
        ({"URL": "http://127.0.0.1:9"}, "API_KEY is not set"),
        ({"HTTPS_PORT": "9"}, "no appliance found: `make up` starts one"),
    ],
)
def test_what_cannot_begin_says_why_in_one_line(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    environment = {"PATH": os.environ["PATH"], "APPLIANCE_STATE": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/loadtest.d/run.py")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "loadtest").exists(), "nothing is left half-started"


def test_the_key_is_no_argument_that_others_could_read(tmp_path: Path) -> None:
    """The generator finds it among its arguments, `ps` does not."""
    (tmp_path / "aiperf").mkdir()
    (tmp_path / "aiperf/cli.py").write_text(
        "import os, sys\n"
        "def app():\n"
        "    shown = open('/proc/self/cmdline').read()\n"
        "    print(sys.argv[1:], 'sk-of-the-run' in shown, 'LOADTEST_KEY' in os.environ)\n"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "LOADTEST_KEY": "sk-of-the-run"}
    argv = [sys.executable, str(ROOT / "scripts/loadtest.d/generator.py"), "profile"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['profile', '--api-key', 'sk-of-the-run'] False False\n"


def test_the_prompts_ship_with_the_project() -> None:
    prompts = [json.loads(line) for line in (ROOT / "scripts/loadtest.d/prompts.jsonl").read_text().splitlines()]
    texts = [prompt["text"] for prompt in prompts]
    assert len(set(texts)) == len(texts) >= 40
    assert min(map(len, texts)) < 100
    assert max(map(len, texts)) > 1000
