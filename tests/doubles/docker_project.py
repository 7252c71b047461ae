#!/usr/bin/env -S python3 -IS
"""A `docker` that has one Compose project, for tests of the day-two verbs: what they change is there to be looked at.

$DOCKER_PROJECT has `containers.json` (as `docker inspect` tells them), `volumes/` with a folder each, `images.json`
(name to id), `config.json` (as `compose config` tells it), and `calls` with a line of JSON for each call. A call that
contains a line of `fail` ends with 1. `interrupt` has a signal's name and words: the first call that contains them is
where the operator loses patience. The carrier runs for real, on the volumes' folders.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(os.environ["DOCKER_PROJECT"])
NOTED = ("CERTIFICATES_DIR", "MODEL_CACHE_DIR", "COMPOSE_PROJECT_NAME")


def read(name: str, default: Any) -> Any:
    """One of the files, where it is there."""
    return json.loads((HERE / name).read_text()) if (HERE / name).exists() else default


def lines(name: str) -> list[str]:
    """Words that a call may contain."""
    return (HERE / name).read_text().splitlines() if (HERE / name).exists() else []


def carrier(words: list[str]) -> int:
    """`docker run … --volume FROM:/carried/NAME … -c SCRIPT VERB NAME=/carried/NAME…` on this machine's folders."""
    mounts = [words[at + 1].rsplit(":", 1) for at, word in enumerate(words) if word == "--volume"]
    sources = {inside: source if "/" in source else str(HERE / "volumes" / source) for source, inside in mounts}
    script, verb, *named = words[words.index("-c") + 1 :]
    folders = [f"{name}={sources[inside]}" for name, inside in (word.split("=") for word in named)]
    return subprocess.run(["python3", "-c", script, verb, *folders], check=False).returncode


def containers(words: list[str]) -> str:
    """`docker ps`: ids."""
    every = any(word.startswith("-a") for word in words)
    image = [word.removeprefix("ancestor=") for word in words if word.startswith("ancestor=")]
    listed = [one for one in read("containers.json", []) if every or one["State"]["Running"]]
    return "\n".join(one["Id"] for one in listed if not image or one["Image"] in image)


def volumes(words: list[str]) -> str:
    """`docker volume ls|inspect|create|rm`."""
    if words[0] == "inspect":
        names = [{"Name": name, "Labels": {"com.docker.compose.volume": name.partition("_")[2]}} for name in words[1:]]
        return json.dumps(names)
    if words[0] == "create":
        (HERE / "volumes" / words[-1]).mkdir(parents=True)
    return "\n".join(sorted(path.name for path in (HERE / "volumes").glob("*"))) if words[0] == "ls" else ""


def images(words: list[str]) -> str:
    """`docker image ls|tag|rm|save`: names by glob, or the ids of what Compose built."""
    known: dict[str, str] = read("images.json", {})
    if words[0] == "ls":
        wanted = [word.removeprefix("reference=") for word in words if word.startswith("reference=")]
        if wanted:
            return "\n".join(name for name in known if fnmatch.fnmatch(name, wanted[0]))
        labels = read("labels.json", {})  # image's id to the project that its label names
        asked = next(word for word in words if word.startswith("label=")).removeprefix("label=")
        project = asked.partition("=")[2]
        return "\n".join(image for image, label in labels.items() if not project or label == project)
    if words[0] == "tag":
        known[words[2]] = known.get(words[1], words[1])
    if words[0] == "rm":
        gone = {word for word in words[1:] if not word.startswith("-")}
        known = {name: image for name, image in known.items() if name not in gone and image not in gone}
    if words[0] == "save":
        Path(words[words.index("--output") + 1]).write_text("images")
    (HERE / "images.json").write_text(json.dumps(known))
    return ""


def main() -> int:
    """Note, answer, end."""
    words = sys.argv[1:]
    call = " ".join(words)
    noted = {name: os.environ[name] for name in NOTED if name in os.environ}
    with (HERE / "calls").open("a") as calls:
        calls.write(json.dumps({"words": words, **noted}) + "\n")
    if any(word in call for word in lines("fail")):
        print("the double fails", file=sys.stderr)
        return 1
    name, _, word = "".join(lines("interrupt")).partition(" ")
    if name and word in call:
        (HERE / "interrupt").unlink()
        os.kill(os.getppid(), signal.Signals[name])
        time.sleep(20)
    if words[0] == "run":
        return carrier(words)
    if words[0] == "rm":
        left = [one for one in read("containers.json", []) if one["Id"] not in words]
        (HERE / "containers.json").write_text(json.dumps(left))
    if words[0] == "compose" and "config" in words:
        print(json.dumps(read("config.json", {})))
    answers = {"ps": containers, "volume": volumes, "image": images, "network": lambda _: ""}
    if words[0] == "inspect":
        print(json.dumps([one for one in read("containers.json", []) if one["Id"] in words]))
    elif words[0] in answers:
        print(answers[words[0]](words[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
