#!/usr/bin/env -S python3 -IS
"""A `docker` for tests of who calls it: notes each call in $DOCKER_DOUBLE/calls and answers as the files there say.

`fail` holds words; a call that contains one of them ends with 1. `ps` is what `compose ps` prints, `files` the Compose
files of containers that somebody has started by hand, `outdated` the services that run on secrets of before; what a
call brings on its input is in `input`. Exists as a program on PATH, so that what is tested calls it as it
calls the real one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ANSWERS = {
    "info": '28.5.2|/nowhere|{"runc":{}}',
    "compose version": "2.40.3",
    "keys list": '{"data": []}',
    "keys create": '{"id": "key_1", "name": "first", "secret": "sk-made-by-the-double"}',
    "exec -T gateway python3": "some-model",
}


def main() -> int:
    """Note, answer, end."""
    folder = Path(os.environ["DOCKER_DOUBLE"])
    words = [word for word in sys.argv[1:] if not word.endswith(".yaml") and word not in {"-f", "--project-directory"}]
    call = " ".join(word for word in words if not word.startswith("/"))
    with (folder / "calls").open("a") as calls:
        calls.write(call + "\n")
    failing = (folder / "fail").read_text().splitlines() if (folder / "fail").exists() else []
    for word in failing:
        if word in call:
            print(f"the double fails at {word}", file=sys.stderr)
            return 1
    if "compose ps" in call:
        up = any(line.startswith("compose up") for line in (folder / "calls").read_text().splitlines())
        started = up or (folder / "files").exists()
        stopped = any(line.startswith("compose down") for line in (folder / "calls").read_text().splitlines())
        path = folder / "ps"
        print(path.read_text() if path.exists() and started and not stopped else "")
    elif call.startswith("ps ") and (folder / "files").exists():
        print((folder / "files").read_text())
    elif "compose cp" in call:
        Path(sys.argv[-1]).write_bytes((folder / "certificate.pem").read_bytes())
    elif "exec -T vllm" in call and (folder / "engine").exists():
        print((folder / "engine").read_text())
    if "--password-from-stdin" in call:
        (folder / "input").write_text(sys.stdin.read())
    if "/run/secrets'" in call:
        outdated = (folder / "outdated").read_text().split() if (folder / "outdated").exists() else []
        print("outdated" if any(f"exec -T {service} " in call for service in outdated) else "current")
        return 0
    for key, answer in ANSWERS.items():
        if key in call:
            print(answer)
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
