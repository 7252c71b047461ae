"""The official client with a deadline that a test lets pass when it likes."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai

from tests.doubles.flow_site import PATHS
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.waiting import PATIENCE, wait_until


class Patient:
    """The official client with a deadline, in a thread of its own; `leave` lets the deadline pass."""

    def __init__(self, gateway: GatewayProcess, path: str, body: dict[str, Any], request_id: str) -> None:
        self.received = 0
        self.outcome: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._call = gateway.url, path, body, request_id
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    async def _run(self) -> None:
        url, path, body, request_id = self._call
        self._deadline = asyncio.timeout(None)
        try:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client, self._deadline:
                self._ready.set()
                resource: Any = {
                    PATHS["chat"]: client.chat.completions,
                    PATHS["completions"]: client.completions,
                    PATHS["embeddings"]: client.embeddings,
                    PATHS["responses"]: client.responses,
                }[path]
                known = {name: value for name, value in body.items() if name != "ignore_eos"}
                more = {"ignore_eos": True} if "ignore_eos" in body else None
                headers = {"x-request-id": request_id}
                answer = await resource.create(**known, extra_body=more, extra_headers=headers)
                if body.get("stream"):
                    async for _ in answer:
                        self.received += 1
        except (TimeoutError, openai.APIError) as error:
            self.outcome = error

    def read_some(self) -> None:
        wait_until("some tokens", lambda: self.received >= 5)

    def leave(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._deadline.reschedule(self._loop.time()))
        self._thread.join(PATIENCE)
        assert isinstance(self.outcome, TimeoutError)
        self._loop.close()
