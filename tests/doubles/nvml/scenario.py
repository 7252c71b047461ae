"""What the NVML double answers: GPUs from `gpus/*.txt`, put together and changed while it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIBRARY = "libnvidia-ml.so.1"


def build(folder: Path) -> Path:
    """Compile the double into `folder`, which is then a library path. Skips the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("the NVML double needs a C compiler (Debian: apt-get install gcc libc6-dev)")
    sources = [str(HERE / name) for name in ("libnvidia_ml.c", "events.c")]
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([compiler, *flags, "-o", str(folder / LIBRARY), *sources, "-lpthread"], check=True)
    return folder


def described(gpu: str) -> dict[str, str]:
    """The answers of one GPU without its index: `gpus/NAME.txt`."""
    lines = (HERE / "gpus" / f"{gpu}.txt").read_text().splitlines()
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return {key: value for key, _, value in pairs}


class Scenario:
    """A machine as the double shows it. Every change is written at once and seen by the next call."""

    def __init__(self, folder: Path, *gpus: str) -> None:
        self.path, self.events = folder / "nvml.txt", folder / "events.txt"
        self.events.touch()
        self.answers = {
            "DriverVersion": "580.95.05",
            "NVMLVersion": "13.580.95.05",
            "CudaDriverVersion": "13000",
            "Count": str(len(gpus)),
        }
        for index, name in enumerate(gpus):
            self.add(index, name)
        self._write()

    def add(self, index: int, gpu: str) -> None:
        """Describe GPU `index`. The second and later ones of a kind get a uuid of their own."""
        for key, value in described(gpu).items():
            self.answers[f"{index}.{key}"] = f"{value[:-2]}{index:x}{value[-1]}" if key == "UUID" and index else value

    def uuid(self, index: int) -> str:
        """The uuid of GPU `index`."""
        return self.answers[f"{index}.UUID"]

    def change(self, **answers: str | None) -> None:
        """Set answers by key, written with `__` for the dots: `change(_1__PowerUsage="hang")`; None removes one."""
        for name, value in answers.items():
            key = name.removeprefix("_").replace("__", ".")
            if value is None:
                self.answers.pop(key, None)
            else:
                self.answers[key] = value
        self._write()

    def xid(self, gpu: int, xid: int, repetitions: int = 1) -> None:
        """Have XID events happen."""
        with self.events.open("a") as file:
            file.write(f"{gpu} {xid} {repetitions}\n")

    def environment(self, library: Path) -> dict[str, str]:
        """What the exporter's environment needs to find the double."""
        return {"NVML_DOUBLE": str(self.path), "NVML_DOUBLE_EVENTS": str(self.events), "LD_LIBRARY_PATH": str(library)}

    def _write(self) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(f"{key} {value}\n" for key, value in self.answers.items()))
        os.replace(fresh, self.path)
