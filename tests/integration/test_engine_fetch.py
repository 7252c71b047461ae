"""`engine fetch` and `engine fit` against a hub on this machine: whole, resumed, checked, and refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doubles.engine_hub import Hub
from tests.doubles.engine_running import ENGINE
from tests.doubles.waiting import wait_until

NAME = "maker/model-1b"
CONFIG = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 1000}
WEIGHTS = os.urandom(25_000_000)  # the library writes 10 MB at a time
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same weights again",
    "tokenizer.json": b"{}",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(NAME, dict(FILES)) as serving:
        yield serving


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "MODEL_CACHE_DIR": str(tmp_path / "models"),
        "ENGINE_DEVICE": "cpu",
    }


def engine(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ENGINE, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=environment["HOME"],
    )


def test_a_model_arrives_whole_and_once(environment: dict[str, str], hub: Hub) -> None:
    done = engine(environment, "fetch", NAME)
    assert done.returncode == 0, done.stderr
    folder = Path(environment["MODEL_CACHE_DIR"]) / NAME
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / ".complete").is_file()
    assert not (folder / "pytorch_model.bin").exists()
    assert "model.safetensors" in done.stdout
    downloads = len(hub.ranges)
    again = engine(environment, "fetch", NAME)
    assert again.returncode == 0
    assert len(hub.ranges) == downloads


def test_an_interrupted_download_goes_on_where_it_stopped(environment: dict[str, str], hub: Hub) -> None:
    hub.stall_after = 21_000_000
    started = subprocess.Popen([ENGINE, "fetch", NAME], env=environment, stdout=subprocess.DEVNULL)
    folder = Path(environment["MODEL_CACHE_DIR"])

    def arrived() -> int:
        return max((path.stat().st_size for path in folder.rglob("*.part")), default=0)

    try:
        assert hub.stalled.wait(60)
        wait_until("the first part on disk", lambda: arrived() > 0)
    finally:
        started.kill()
        started.wait()
    here = arrived()
    assert not (folder / NAME / ".complete").exists()
    hub.stall_after = None
    done = engine(environment, "fetch", NAME)
    assert done.returncode == 0, done.stderr
    assert hub.ranges[-1] == here
    assert (folder / NAME / "model.safetensors").read_bytes() == WEIGHTS


def test_damage_on_the_way_is_noticed(environment: dict[str, str], hub: Hub) -> None:
    hub.damaged.add("model.safetensors")
    done = engine(environment, "fetch", NAME)
    assert done.returncode == 1
    assert "arrived damaged" in done.stderr
    assert not (Path(environment["MODEL_CACHE_DIR"]) / NAME / ".complete").exists()
    hub.damaged.clear()
    assert engine(environment, "fetch", NAME).returncode == 0


def test_another_revision_is_fetched_and_nothing_of_the_first_is_left(environment: dict[str, str], hub: Hub) -> None:
    first = engine({**environment, "MODEL_REVISION": "v1"}, "fetch", NAME)
    assert first.returncode == 0, first.stderr
    # The next one: a configuration of the same length, weights in another file.
    config = FILES["config.json"].replace(b"256", b"512")
    del hub.files["model.safetensors"]
    hub.files |= {"config.json": config, "model-00001-of-00001.safetensors": WEIGHTS[::-1]}
    hub.commit = "f" * 40
    assert engine(environment, "fetch", NAME).returncode == 0  # none is asked for: what is here will do
    downloads = len(hub.ranges)
    second = {**environment, "MODEL_REVISION": "v2"}
    done = engine(second, "fetch", NAME)
    assert done.returncode == 0, done.stderr
    assert "MODEL_REVISION=v2" in done.stdout
    folder = Path(environment["MODEL_CACHE_DIR"]) / NAME
    assert [path.name for path in folder.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert (folder / "config.json").read_bytes() == config
    assert len(hub.ranges) == downloads + 1
    for asked in ("v2", "f" * 40):
        assert engine({**second, "MODEL_REVISION": asked}, "fetch", NAME).returncode == 0
    assert len(hub.ranges) == downloads + 1


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    [line] = done.stderr.strip().splitlines()
    return line


def test_refusals_are_one_line_that_says_what_to_do(environment: dict[str, str], hub: Hub) -> None:
    unknown = engine(environment, "fetch", "maker/none")
    assert unknown.returncode == 1
    assert "MODEL_NAME" in one_line(unknown)
    hub.gated = True
    gated = engine(environment, "fetch", NAME)
    assert "HF_TOKEN" in one_line(gated)
    offline = engine({**environment, "HF_HUB_OFFLINE": "1"}, "fetch", NAME)
    assert "HF_HUB_OFFLINE" in one_line(offline)
    unreachable = engine({**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}, "fetch", NAME)
    assert "cannot be reached" in one_line(unreachable)
    folder = engine(environment, "fetch", "/no/such/folder")
    assert "config.json" in one_line(folder)


def test_fit_needs_headers_alone(environment: dict[str, str], hub: Hub) -> None:
    done = engine(environment, "fit", NAME, "--gpu-memory", "24", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["advice"].startswith("yes")
    assert hub.ranges == []
    no = engine({**environment, "TP_SIZE": "3"}, "fit", NAME, "--gpu-memory", "24")
    assert no.returncode == 1
    assert "does not divide" in no.stdout
    assert engine(environment, "fit", "maker/none", "--gpu-memory", "24").returncode == 2


def test_serve_refuses_early_what_cannot_work(environment: dict[str, str], tmp_path: Path) -> None:
    """Each in a second, with one line and exit code 2, and nothing started."""
    model = tmp_path / "models" / "here"
    model.mkdir(parents=True)
    (model / ".complete").write_text("")
    (model / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    serve = {**environment, "VLLM_PYTHON": "python3", "MODEL_NAME": "here", "ENGINE_STATE_DIR": str(tmp_path / "state")}
    for wrong, named in (
        ({"TP_SIZE": "3"}, "TP_SIZE"),
        ({"QUANTIZATION": "gptq"}, "QUANTIZATION"),
        ({"MAX_MODEL_LEN": "9999999"}, "MAX_MODEL_LEN"),
        ({"MODEL_NAME": "/no/such"}, "MODEL_NAME"),
        ({"VLLM_PYTHON": "no-such-python"}, "VLLM_PYTHON"),
        ({"VLLM_CPU_KVCACHE_SPACE": "9999"}, "VLLM_CPU_KVCACHE_SPACE"),
        ({"ENGINE_STATE_DIR": "/proc/no"}, "ENGINE_STATE_DIR"),
        ({"ENGINE_DEVICE": "gpu", "TP_SIZE": "4"}, "GPU"),
    ):
        done = engine({**serve, **wrong}, "serve")
        assert done.returncode == 2, (wrong, done.stdout, done.stderr)
        assert named in one_line(done)
