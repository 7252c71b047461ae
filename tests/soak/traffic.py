"""What callers do all day, through the edge: every dialect, hang-ups, hangs, errors, refusals, nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.doubles.flow_site import PATHS, asking
from tests.soak.site import CANARY, Site

# kind → share. Engine troubles are directives to the double; hang-ups are the client's own.
KINDS = {
    "json": 26, "stream": 24, "abort": 12, "embeddings": 8, "responses": 4, "messages": 4, "completions": 4,
    "large": 2, "too large": 1, "wrong key": 3, "malformed": 3, "unknown model": 2, "unknown route": 1,
    "engine error": 2, "engine dies": 2, "engine hangs": 0.3, "slow reader": 0.7, "usage": 1,
}  # fmt: skip


@dataclass
class Seen:
    """What callers saw. `ended`: usage told by whole answers, by request id."""

    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    ended: dict[str, tuple[int, int]] = field(default_factory=dict)
    broken: int = 0  # connections that ended before their answer did
    wrong: list[str] = field(default_factory=list)  # answers that must not be


@dataclass
class Keys:
    """The keys that callers use now; the administrator changes the set while they do."""

    steady: dict[str, str]  # name → secret
    passing: list[str] = field(default_factory=list)

    def pick(self, chance: random.Random) -> str:
        if self.passing and chance.random() < 0.2:
            return chance.choice(self.passing)
        return chance.choice(list(self.steady.values()))


class Callers:
    """`people` callers with pauses, about `rate` calls a second together, until `stop`."""

    def __init__(self, site: Site, keys: Keys, rate: float, people: int, seed: int) -> None:
        self.site, self.keys, self.seen = site, keys, Seen()
        self._pause = people / rate
        self._people = people
        self._seed = seed
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._person(random.Random(self._seed * 1000 + n))) for n in range(self._people)
        ]

    async def stop(self) -> None:
        """Let each caller finish the call it is in."""
        self._over.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*self._tasks)

    async def _person(self, chance: random.Random) -> None:
        trust = self.site.edge.trust()
        timeout = aiohttp.ClientTimeout(total=45)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust), timeout=timeout) as session:
            while not self._over.is_set():
                kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
                self.seen.kinds[kind] += 1
                try:
                    await self._call(session, kind, chance)
                except (aiohttp.ClientError, TimeoutError, OSError, asyncio.IncompleteReadError):
                    self.seen.broken += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(chance.expovariate(1 / self._pause)):
                        await self._over.wait()

    async def _call(self, session: aiohttp.ClientSession, kind: str, chance: random.Random) -> None:
        path, body, key = self._request(kind, chance)
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        if chance.random() < 0.1:
            headers["connection"] = "close"
        url = self.site.edge.url + path
        if kind == "usage":
            async with session.get(url, headers=headers) as answer:
                await answer.read()
                self._note(answer.status)
            return
        async with session.post(url, data=io.BytesIO(body), headers=headers) as answer:
            if kind == "abort":
                with contextlib.suppress(TimeoutError):  # a random point in bytes, or in time
                    async with asyncio.timeout(chance.uniform(0.001, 0.15)):
                        await answer.content.readexactly(chance.randint(1, 4000))
                answer.close()
                self.seen.answers["hung up"] += 1
                return
            if kind == "slow reader":
                data = b""
                while part := await answer.content.read(256):
                    data += part
                    await asyncio.sleep(0.02)
            else:
                data = await answer.read()
            self._note(answer.status)
            self._judge(kind, answer, data)

    def _note(self, status: int) -> None:
        self.seen.answers[str(status)] += 1

    def _judge(self, kind: str, answer: aiohttp.ClientResponse, data: bytes) -> None:
        expected = {
            "wrong key": (401,), "malformed": (400,), "unknown model": (404,), "unknown route": (404,),
            "too large": (413,),
        }.get(kind)  # fmt: skip
        passing = (401, 403, 429, 502, 503, 504)
        if expected and answer.status not in (*expected, *passing):
            self.seen.wrong.append(f"{kind}: {answer.status} {data[:200]!r}")
        if answer.status == 500:
            self.seen.wrong.append(f"{kind}: a fault of ours: {data[:200]!r}")
        if answer.status >= 400:
            error = json.loads(data).get("error")
            if isinstance(error, dict):
                self.seen.codes[str(error.get("code") or error.get("type"))] += 1
            else:
                self.seen.wrong.append(f"{kind}: an error in another shape: {data[:200]!r}")
            return
        request_id = answer.headers["x-request-id"]
        usage = self._usage(kind, data)
        if usage is not None:
            self.seen.ended[request_id] = usage

    @staticmethod
    def _usage(kind: str, data: bytes) -> tuple[int, int] | None:
        if kind in ("json", "embeddings", "completions", "large"):
            told = json.loads(data)["usage"]
            return told["prompt_tokens"], told.get("completion_tokens", 0)
        if kind in ("stream", "slow reader") and data.endswith(b"data: [DONE]\n\n"):
            events = [json.loads(line[6:]) for line in data.split(b"\n") if line.startswith(b"data: {")]
            if any("error" in event for event in events):
                return None
            told = next(event["usage"] for event in reversed(events) if event.get("usage"))
            return told["prompt_tokens"], told["completion_tokens"]
        return None

    def _request(self, kind: str, chance: random.Random) -> tuple[str, bytes, str]:
        key = self.keys.pick(chance)
        tokens, pace = chance.randint(1, 40), chance.choice([0, 0, 1, 5, 20])
        directive = f"tokens={tokens},pace_ms={pace}"
        stream: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        limit: dict[str, Any] = {"max_tokens": 60} if chance.random() < 0.7 else {}
        what, more = "chat", limit
        if kind in ("stream", "slow reader"):
            more = limit | stream
        elif kind == "abort":
            more = limit | (stream if chance.random() < 0.7 else {})
        elif kind in ("embeddings", "responses", "messages", "completions"):
            what, more = kind, ({"stream": True} if kind in ("responses", "messages") and chance.random() < 0.6 else {})
        elif kind == "engine error":
            directive += chance.choice([f",error_after={tokens // 2}", ",status=500", ",status=400"])
            more = limit | (stream if chance.random() < 0.6 else {})
        elif kind == "engine dies":
            directive += chance.choice([f",die_after={tokens // 2 + 1}", ",die=headers"])
            more = limit | (stream if chance.random() < 0.6 else {})
        elif kind == "engine hangs":
            directive += chance.choice([",hang=headers", f",hang_after={tokens // 2 + 1}"])
            more = limit | stream
        elif kind == "wrong key":
            key = f"sk-gw-wrong-{chance.getrandbits(60):x}"
        body = asking(what, directive, **more)
        text = f" {CANARY} "
        if kind == "large":
            text += "word " * chance.randint(20_000, 1_000 * 100) if chance.random() < 0.1 else "word " * 6000
        if kind == "too large":
            text += "x" * 1_100_000
        if kind == "unknown model":
            body["model"] = f"nobody-{chance.getrandbits(40):x}"
        for name in ("input", "prompt"):
            if isinstance(body.get(name), str):
                body[name] += text
        for message in body.get("messages", []):
            message["content"] += text
        data = json.dumps(body).encode()
        if kind == "malformed":
            data = chance.choice([data[:-5], b"{}", b"[1]", b"\xff\xfe", json.dumps({**body, "n": "x"}).encode()])
        path = {"unknown route": f"/v1/none/{chance.getrandbits(30)}", "usage": "/v1/usage"}.get(kind, PATHS[what])
        return path, data, key
