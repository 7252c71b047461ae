"""What holds for a running vLLM under its supervisor, and for what we believe of the pinned version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.doubles.engine_running import ROOT, command_line
from tests.engine.conftest import RealEngine, real
from tests.unit.test_engine_fit import GEMMA_27B, LLAMA_70B, MIXTRAL, QWEN_MOE

from engine import command, fit, settings, shape

GOLDEN = ROOT / "tests" / "golden" / "engine"
pytestmark = pytest.mark.timeout(1800)
GEMMA = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "layer_types": ["full_attention" if number % 6 == 5 else "sliding_attention" for number in range(62)],
}

TELL = """
import json, re, vllm.envs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
flags = sorted({flag for action in parser._actions for flag in action.option_strings})
names = sorted(name for name in vllm.envs.environment_variables if name.startswith("VLLM_"))
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
print(json.dumps({"flags": flags, "names": names, "methods": QUANTIZATION_METHODS}))
"""


def ask(engine: RealEngine, path: str, body: dict[str, Any], seconds: float = 240) -> dict[str, Any]:
    """One call straight to vLLM."""
    request = urllib.request.Request(
        f"{engine.url}{path}",
        json.dumps({"model": engine.model, **body}).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {engine.api_key}"},
    )
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def kv_tokens(engine: RealEngine) -> int:
    """The size of the KV cache that vLLM itself reports in its log."""
    [said] = re.findall(r"KV cache size: ([\d,]+) tokens", engine.log.read_text())[-1:]
    return int(said.replace(",", ""))


def test_a_seeded_call_whose_prompt_is_computed_in_parts_does_not_end_the_engine(engine: RealEngine) -> None:
    """Beside other calls, on a CPU, this ended vLLM, and with it everybody's answers."""
    long = [number * 7 + 1000 for number in range(400)]  # the engine computes 64 tokens in a step
    seeded = {"temperature": 1.0, "seed": 7, "max_tokens": 40, "ignore_eos": True}
    bodies = [{**seeded, "prompt": long[number:]} for number in range(6)]
    with ThreadPoolExecutor(len(bodies)) as callers:
        for answer in callers.map(lambda body: ask(engine, "/v1/completions", body), bodies):
            assert answer["usage"]["completion_tokens"] == 40
    assert engine.status()["state"] == "ready"


def test_it_answers_from_a_real_model(engine: RealEngine) -> None:
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    answer = ask(engine, "/v1/chat/completions", {"messages": [question], "temperature": 0, "max_tokens": 20})
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_it_tells_what_it_is(engine: RealEngine) -> None:
    status = engine.status()
    assert (status["model"], status["device"], status["ready"]) == (engine.model, "cpu", True)
    assert all(seconds >= 0 for seconds in status["phase_seconds"].values())
    assert engine.metric("engine_prefill_tokens_per_second") > 10


def test_the_progress_page_is_the_supervisors_alone(engine: RealEngine) -> None:
    request = urllib.request.Request(f"{engine.url}/engine/progress", headers={"x-engine-token": "guessed"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 404
    refused.value.close()


def test_no_secret_is_in_the_log_or_on_the_command_line(engine: RealEngine) -> None:
    assert engine.api_key not in engine.log.read_text()
    assert all(engine.api_key not in command_line(process) for process in engine.family())


def test_log_lines_are_json(engine: RealEngine) -> None:
    lines = [json.loads(line) for line in engine.log.read_text().splitlines()]
    assert {"engine_starting", "vllm_log", "engine_ready"} <= {line["event"] for line in lines}


def test_fit_agrees_with_the_engine(engine: RealEngine, built: dict[str, str]) -> None:
    """One GiB of KV cache, the CPU build's blocks of 128 tokens."""
    config = json.loads((Path(built["MODEL_CACHE_DIR"]) / engine.model / "config.json").read_text())
    said = fit.capacity(shape.read(config), fit.GIB, 8192, block=128, in_flight=fit.cpu_batch(1).in_flight)
    assert said.tokens == pytest.approx(kv_tokens(engine), rel=0.05)


def test_the_pinned_vllm_knows_all_that_we_say(built: dict[str, str]) -> None:
    """Its flags and variables are those recorded; run with `record` as argument to record them anew."""
    told = subprocess.run(
        [f"{built['ENGINE_VENV']}/bin/python", "-W", "ignore", "-c", TELL], check=True, capture_output=True, text=True
    )
    truth = json.loads(told.stdout.splitlines()[-1])
    assert (GOLDEN / "vllm-flags.txt").read_text().splitlines() == truth["flags"]
    assert settings.vllm_names() == set(truth["names"])
    assert settings.vllm_quantizations() == set(truth["methods"])


@pytest.mark.long
@pytest.mark.parametrize("family", ["gemma", "mixtral"])
def test_fit_agrees_for_other_families(family: str, built: dict[str, str], tmp_path: Path) -> None:
    folder = tiny_model(family, built, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    with real(tmp_path / "run", built, MODEL_NAME=str(folder), SERVED_MODEL_NAME="tiny") as running:
        running.ready()
        said = fit.capacity(shape.read(config), fit.GIB, 8192, block=128, in_flight=fit.cpu_batch(1).in_flight)
        print(f"\n{family}: the engine has {kv_tokens(running)} tokens of KV cache, fit says {said.tokens}")
        assert said.tokens == pytest.approx(kv_tokens(running), rel=0.05)


LARGE = {
    "Llama 70B": (LLAMA_70B, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, 4, 1),
    "Gemma 27B": (GEMMA_27B["text_config"], GEMMA, 2, 1),
    "Gemma 27B, two steps in flight": (GEMMA_27B["text_config"], GEMMA, 2, 2),
    "Mixtral 8x7B": (MIXTRAL, {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, 2, 1),
    "Qwen3 30B-A3B": (QWEN_MOE, {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, 4, 1),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LARGE)
def test_fit_agrees_with_vllms_own_plan_for_large_models(name: str, built: dict[str, str], tmp_path: Path) -> None:
    """From their configurations alone: 20 GiB of cache, 8192 tokens a sequence, steps of 2048."""
    config, kind, tp, steps = LARGE[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, **kind}))
    maker = str(ROOT / "tests" / "doubles" / "engine_kv_plan.py")
    argv = [f"{built['ENGINE_VENV']}/bin/python", "-I", "-W", "ignore", maker, str(tmp_path)]
    numbers = [str(number) for number in (20, tp, 8192, 2048, steps)]
    done = subprocess.run([*argv, *numbers], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = fit.capacity(shape.read(config), 20 * fit.GIB, 8192, tp=tp, in_flight=2048 * steps)
    print(f"\n{name}, TP {tp}: vLLM plans {theirs['tokens']} tokens, fit says {ours.tokens}")
    assert ours.tokens == pytest.approx(theirs["tokens"], rel=0.05)
    assert ours.sequences == pytest.approx(theirs["sequences"], rel=0.05)


def tiny_model(family: str, built: dict[str, str], folder: Path) -> Path:
    """A random model of `family` that two processes can share."""
    target = folder / f"tiny-{family}"
    maker = ROOT / "tests" / "doubles" / "engine_tiny_model.py"
    tokenizer = Path(built["MODEL_CACHE_DIR"]) / "SmolLM2-135M-Instruct"
    argv = [f"{built['ENGINE_VENV']}/bin/python", "-I", "-W", "ignore", str(maker), family, str(target), str(tokenizer)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def test_argv_is_made_of_recorded_flags() -> None:
    """Everything that settings can write is a flag of the pinned version."""
    flags = set((GOLDEN / "vllm-flags.txt").read_text().splitlines())
    source = Path(command.__file__).read_text()
    assert set(re.findall(r'"(--[a-z-]+)"', source)) - flags == {"--no-enable-prefix-caching"} - flags


if __name__ == "__main__":
    tell = subprocess.run([*sys.argv[1:], "-W", "ignore", "-c", TELL], check=True, capture_output=True, text=True)
    recorded = json.loads(tell.stdout.splitlines()[-1])
    GOLDEN.mkdir(parents=True, exist_ok=True)
    (GOLDEN / "vllm-flags.txt").write_text("\n".join(recorded["flags"]) + "\n")
