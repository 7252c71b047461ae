"""A second start on the same volume is faster, because it finds what the first one compiled; compiling is on here."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.conftest import RealEngine, real
from tests.engine.test_engine_real import ask

from engine.states import Phase

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
COMPILED = (".so", ".cubin", ".ptx", ".bin", ".cpp", ".py", ".json")


def seconds(engine: RealEngine) -> dict[str, float]:
    """What the last start took, by phase, as the supervisor's page says."""
    return {name: engine.metric(f'engine_ready_seconds{{phase="{name}"}}') for name in (*Phase, "total")}


def compiled(engine: RealEngine) -> dict[str, tuple[int, int]]:
    """Files of the compile caches with their sizes and times of change."""
    state = Path(engine.environment["ENGINE_STATE_DIR"])
    found = {}
    for folder in ("vllm", "triton", "cache"):
        for path in (state / folder).rglob("*"):
            if path.is_file() and path.suffix in COMPILED:
                facts = path.stat()
                found[str(path.relative_to(state))] = (facts.st_size, facts.st_mtime_ns)
    return found


def check_answers(engine: RealEngine) -> None:
    question = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    assert "Paris" in ask(engine, "/v1/completions", question)["choices"][0]["text"]


def test_the_second_start_finds_what_the_first_compiled(built: dict[str, str], tmp_path: Path) -> None:
    with real(tmp_path, built, ENGINE_EAGER="false") as engine:
        engine.ready()
        cold = seconds(engine)
        check_answers(engine)
        files = compiled(engine)
        assert engine.stop() == 0
        engine.start().ready()
        warm = seconds(engine)
        check_answers(engine)
        again = compiled(engine)
        assert engine.stop() == 0
    print(f"\ncold {cold}\nwarm {warm}\n{len(files)} files, {sum(size for size, _ in files.values()) >> 10} KiB")
    assert any(name.startswith("vllm/") for name in files)
    rewritten = {name for name, facts in files.items() if again.get(name) != facts}
    assert rewritten == set()
    assert warm["compile"] < cold["compile"] * 0.7  # the machine may be busier this time, but not that much
    assert warm["total"] < cold["total"]


def test_an_eager_start_for_comparison(built: dict[str, str], tmp_path: Path) -> None:
    with real(tmp_path, built, ENGINE_EAGER="true") as engine:
        engine.ready()
        first = seconds(engine)
        assert engine.stop() == 0
        engine.start().ready()
        print(f"\neager, first {first}\neager, second {seconds(engine)}")
        check_answers(engine)
        assert engine.stop() == 0
