"""A second start on the same volume is faster, because it finds what the first one compiled; compiling is on here.

A tiny model, whose compilation takes a minute and not five.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.conftest import RealEngine, real
from tests.engine.test_engine_real import ask, tiny_model

from engine.states import Phase

pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]
CACHES = ("vllm", "triton", "inductor")
REWRITTEN = (".lock",)  # taken at every start


def seconds(engine: RealEngine) -> dict[str, float]:
    """What the last start took, by phase, as the supervisor's page says."""
    return {name: engine.metric(f'engine_ready_seconds{{phase="{name}"}}') for name in (*Phase, "total")}


def compiled(engine: RealEngine) -> dict[str, tuple[int, int]]:
    """Files of the compile caches with their sizes and times of change."""
    state = Path(engine.environment["ENGINE_STATE_DIR"])
    files = [path for folder in CACHES for path in (state / folder).rglob("*") if path.is_file()]
    facts = {str(path.relative_to(state)): path.stat() for path in files if path.suffix not in REWRITTEN}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in facts.items()}


def answer(engine: RealEngine) -> str:
    question = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    return str(ask(engine, "/v1/completions", question)["choices"][0]["text"])


def test_the_second_start_finds_what_the_first_compiled(built: dict[str, str], tmp_path: Path) -> None:
    places = {"MODEL_NAME": str(tiny_model("llama", built, tmp_path)), "SERVED_MODEL_NAME": RealEngine.model}
    with real(tmp_path / "run", built, ENGINE_EAGER="false", **places) as engine:
        engine.ready()
        cold = seconds(engine)
        said = answer(engine)
        files = compiled(engine)
        assert engine.stop() == 0
        engine.start().ready()
        warm = seconds(engine)
        assert answer(engine) == said
        again = compiled(engine)
        assert engine.stop() == 0
    print(f"\ncold {cold}\nwarm {warm}\n{len(files)} files, {sum(size for size, _ in files.values()) >> 10} KiB")
    print("\n".join(sorted(set(again) - set(files))[:20]))
    assert any(name.endswith(".so") for name in files)
    assert {
        name for name, facts in files.items() if name.endswith((".so", ".cpp")) and again.get(name) != facts
    } == set()
    assert {name for name in set(again) - set(files) if name.endswith(".so")} == set()
    assert "load failure" not in engine.log.read_text()
    assert warm["compile"] < cold["compile"] * 0.7  # the machine may be busier this time, but not that much
    assert warm["total"] < cold["total"]
