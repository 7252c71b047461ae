"""A stand-in for vLLM as the supervisor sees it: an API server process, a core process behind it, one that left the session.

Started as vLLM is (`program -m vllm.entrypoints.openai.api_server --port …`), because it is put in place of vLLM's Python.
Calls go through the real middleware and a real second process, so a stopped core hangs calls here for the same reason as
there. What it does wrong is read from the JSON file that DOUBLE_CONTROL names, at each step, so a test can change it.

    start     "ok" | "crash" (prints `says`, exits 1) | "never" (runs, never listens)
    says      the line it prints when it crashes
    prefill   seconds a prompt takes for each 1000 bytes
    term      "obey" | "ignore"
"""

from __future__ import annotations

import _multiprocessing
import asyncio
import hashlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def control() -> dict[str, Any]:
    try:
        return json.loads(Path(os.environ["DOUBLE_CONTROL"]).read_text())
    except (KeyError, OSError, ValueError):
        return {}


def value(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def mark_of_this_engine() -> str:
    """What its shared memory is known by, whoever else runs a double on this machine."""
    return hashlib.sha256(os.environ["DOUBLE_CONTROL"].encode()).hexdigest()[:12]


def core() -> None:
    """Answers each line after its prefill; holds shared memory; has a child outside the session."""
    mine = f"{mark_of_this_engine()}_{os.getpid()}"
    memory = Path(f"/dev/shm/psm_double_{mine}")
    memory.write_bytes(b"\0" * 4096)
    with memory.open("r+b") as file:
        held = mmap.mmap(file.fileno(), 4096)
    held[0] = 1
    # As vLLM's workers have: a named semaphore, which nobody unlinks when its maker is killed.
    semaphore = _multiprocessing.SemLock(1, 1, 1, f"/double_{mine}", False)
    semaphore.acquire()
    nothing = subprocess.DEVNULL  # our own pipes must end with us
    subprocess.Popen([sys.executable, __file__, "escaped"], start_new_session=True, stdin=nothing, stdout=nothing)
    for line in sys.stdin:
        number, seconds = line.split()
        time.sleep(float(seconds))
        print(number, flush=True)


class Api:
    """The calls, each sent to the core and answered when it answers."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.waiting: dict[int, asyncio.Future[None]] = {}
        self.count = self.done = 0

    async def listen(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.done += 1
            if (future := self.waiting.pop(int(line), None)) and not future.done():
                future.set_result(None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        status, body = await self.answer(scope["path"], receive)
        kind = b"text/plain" if scope["path"] == "/metrics" else b"application/json"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})

    async def answer(self, path: str, receive: Any) -> tuple[int, bytes]:
        if path == "/health":
            return (200 if self.process.returncode is None else 503), b""
        if path == "/v1/models":
            return 200, json.dumps({"data": [{"id": "double", "max_model_len": 100000}]}).encode()
        if path == "/metrics":
            return 200, b"".join(
                f'vllm:{name}{{engine="0"}} {self.done}\n'.encode()
                for name in ("prompt_tokens_total", "generation_tokens_total", "iteration_tokens_total_count")
            )
        if path != "/v1/completions":
            return 404, b"{}"
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.count += 1
        number, future = self.count, asyncio.get_running_loop().create_future()
        self.waiting[number] = future
        seconds = float(control().get("prefill", 0.0)) * len(body) / 1000
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number} {seconds}\n".encode())
        await future
        return 200, json.dumps({"usage": {"prompt_tokens": len(body) // 4}}).encode()


async def api_server() -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "core", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    api = Api(process)
    listening = asyncio.create_task(api.listen())
    module, _, name = value("--middleware").partition(".")
    app = getattr(importlib.import_module(module), name)(api)
    config = Config()
    config.bind = [f"127.0.0.1:{value('--port')}"]
    config.errorlog = None
    config.graceful_timeout = 1
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: None if control().get("term") == "ignore" else over.set())
    print("(APIServer pid=1) INFO 01-01 00:00:00 [double.py:1] Warming up model for the compilation...", flush=True)
    await serve(app, config, shutdown_trigger=over.wait)
    listening.cancel()
    process.kill()
    await process.wait()


if __name__ == "__main__":
    if sys.argv[1] == "core":
        core()
    elif sys.argv[1] == "escaped":
        signal.pause()
    elif control().get("start") == "crash":
        print(control().get("says", "ValueError: it does not work"), flush=True)
        sys.exit(1)
    elif control().get("start") == "never":
        signal.pause()
    else:
        asyncio.run(api_server())
