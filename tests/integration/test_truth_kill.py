"""`kill -9` of the gateway at random instants under mixed load: what a client saw is recorded, once and to the token."""

import http.client
import json
import os
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.postgres import postgres, programs
from tests.doubles.vllm import VllmDouble
from tests.doubles.waiting import wait_until

from gateway import journal
from gateway.store import Database

CLIENTS = 10
KILLS = int(os.environ.get("KILLS", "500"))  # of the long form


@dataclass
class Seen:
    """What the clients saw: the usage of answers that ended, by request id; and everything that was asked."""

    ended: dict[str, tuple[int, int]] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    """Generated tokens that a client had, whether or not it saw the end."""
    sent: list[str] = field(default_factory=list)
    refused: int = 0


class Load:
    """Clients of all kinds on one gateway until it dies: streams, JSON, hang-ups, refusals."""

    def __init__(self, port: int, seed: int, seen: Seen) -> None:
        self.port = port
        self.seen = seen
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self._client, args=(random.Random(seed * 100 + n),)) for n in range(CLIENTS)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs on a dead gateway"

    def _client(self, chance: random.Random) -> None:
        while not self.over.is_set():
            request_id = f"{chance.getrandbits(60):015x}-{time.monotonic_ns()}"
            self.seen.sent.append(request_id)
            try:
                self._call(chance, request_id)
            except (OSError, http.client.HTTPException, ValueError):
                if self.over.wait(0.005):
                    return

    def _call(self, chance: random.Random, request_id: str) -> None:
        kind = chance.choice(["stream", "stream", "stream", "json", "json", "abort", "refused"])
        tokens = chance.randint(1, 40)
        body: dict[str, Any] = {
            "model": "nobody-serves-this" if kind == "refused" else "double",
            "messages": [{"role": "user", "content": f"double:tokens={tokens},pace_ms={chance.choice([0, 1, 5])}"}],
            "max_tokens": 64,
        }
        if kind in ("stream", "abort"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", "x-request-id": request_id}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            wanted = chance.randint(1, 600) if kind == "abort" else 1 << 30
            data = b""
            try:
                while len(data) < wanted and (part := answer.read1(65536)):
                    data += part
            finally:
                if answer.status == 200:
                    self.seen.received[request_id] = tokens_in(data)
            if kind == "abort":
                if connection.sock is not None:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                return
            if answer.status != 200:
                self.seen.refused += 1
                return
            if kind == "json":
                usage = json.loads(data)["usage"]
            else:
                if not data.endswith(b"data: [DONE]\n\n"):
                    return
                events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
                usage = next(u for event in reversed(events) if (u := json.loads(event).get("usage")))
            self.seen.ended[request_id] = (usage["prompt_tokens"], usage["completion_tokens"])
        finally:
            connection.close()


def tokens_in(data: bytes) -> int:
    """Generated tokens in the whole events of a stream: the double sends each in a chunk of its own."""
    whole = data[: data.rfind(b"\n\n") + 2]
    return whole.count(b'"content":"') - whole.count(b'"content":""')


def rows(url: str, sql: str) -> list[Any]:
    """Read the gateway's database as an outsider."""
    database = Database(url)
    with database.session():
        return database.rows(sql)


def prove(address: str, folder: Path, kills: int, seed: int) -> None:
    """Kill the gateway `kills` times under load; after every start, and at the end, the ledger must be right."""
    chance = random.Random(seed)
    seen = Seen()
    with VllmDouble(model="double") as engine:
        with GatewayProcess(VLLM_URL=engine.url, DATABASE_URL=address, SPOOL_DIR=folder) as gateway:
            for number in range(kills):
                load = Load(gateway.port, seed * 1000 + number, seen)
                before = len(seen.ended)
                if number % 2:  # every other time there is an answer to remember, however slow the machine is
                    wait_until("an answer has ended", lambda before=before: len(seen.ended) > before)
                threading.Event().wait(chance.uniform(0.02, 0.5))  # the random instant itself
                gateway.kill()
                load.stop()
                gateway.start()
                # Every hold of the dead process is settled before the next one listens.
                assert rows(address, "SELECT COUNT(*) FROM holds") == [(0,)]
            load = Load(gateway.port, seed * 1000 + kills, seen)
            threading.Event().wait(0.3)
            load.stop()
            engine.wait_idle()
            assert gateway.terminate() == 0
        records = {
            row[0]: row[1:]
            for row in rows(address, "SELECT request_id, prompt_tokens, completion_tokens, outcome FROM usage_records")
        }
        assert len(seen.ended) >= kills // 2, "the load was too thin to prove anything"
        wrong = {i: (usage, records.get(i)) for i, usage in seen.ended.items() if records.get(i) != (*usage, "ok")}
        assert not wrong, (
            f"{len(wrong)} of {len(seen.ended)} ended answers are not in the ledger as the client saw them: {wrong}"
        )
        # Nothing that the engine worked on is missing, nothing is charged that it did not do, and nothing that the
        # gateway had read is forgotten: it is kept before a client gets it.
        missing, wrong = [], []
        behind = {"stream": 0, "json": 0, "cancelled": 0}
        for request in engine.requests():
            if request["path"] == "/tokenize":
                continue  # a gateway that starts asks how much a chat template adds: nobody's call, no token generated
            record = records.get(request["request_id"])
            if record is None:
                missing.append(request)
                continue
            prompt, completion, outcome = record
            received = seen.received.get(request["request_id"], 0)
            if outcome == "ok":
                right = (prompt, completion) == (request["prompt_tokens"], request["completion_tokens"])
            else:
                right = received <= completion <= request["completion_tokens"]
                right = right and prompt in ((request["prompt_tokens"],) if received else (0, request["prompt_tokens"]))
            if not right:
                wrong.append((request, received, record))
            unread = request["prompt_tokens"] + request["completion_tokens"] - prompt - completion
            behind["cancelled" if outcome != "lost" else "stream" if request["stream"] else "json"] += unread
        assert not missing, f"{len(missing)} calls reached the engine and left no record: {missing[:3]}"
        assert not wrong, (len(wrong), wrong[:3])
        lost = sum(record[2] == "lost" for record in records.values())
        assert sum(behind.values()) == sum(
            request["prompt_tokens"] + request["completion_tokens"] for request in engine.requests()
        ) - sum(record[0] + record[1] for record in records.values())
        totals = rows(
            address, "SELECT SUM(prompt_tokens + completion_tokens), SUM(requests + refusals) FROM daily_totals"
        )[0]
        assert (int(totals[0]), int(totals[1])) == (sum(r[0] + r[1] for r in records.values()), len(records))
        assert [journal.read(path.read_bytes()) for path in folder.glob("*.calls")] == [([], None)]
        print(
            f"{kills} kills: {len(seen.sent)} calls sent, {len(seen.ended)} seen to end, {len(records)} records, "
            f"{lost} lost; tokens that the engine made and no gateway read, of lost streams {behind['stream']}, of lost "
            f"JSON answers {behind['json']}, of calls whose client left {behind['cancelled']}"
        )


DIALECTS = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}]},
    "/v1/completions": lambda text: {"prompt": text},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}]},
}


def test_what_was_read_before_a_kill_is_billed_to_the_token(tmp_path):
    """The engine falls silent in the middle; once a client has all that came, a kill costs nobody a token."""
    with VllmDouble(model="double") as engine, GatewayProcess(VLLM_URL=engine.url) as gateway:
        streams = []
        for path, body in DIALECTS.items():
            for after in (2, 3, 17, 40):
                connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
                request_id = f"kill-{path.replace('/', '-')}-{after}"
                fields = {
                    "model": "double",
                    "stream": True,
                    "max_tokens": 64,
                    **body(f"double:tokens=60,hang_after={after}"),
                }
                headers = {
                    "authorization": f"Bearer {KEY}",
                    "content-type": "application/json",
                    "x-request-id": request_id,
                }
                connection.request("POST", path, json.dumps(fields), headers)
                streams.append((path, request_id, connection, connection.getresponse()))

        def counted() -> dict[str, dict[str, Any]]:
            return {request["request_id"]: request for request in engine.requests()}

        for path, request_id, _, answer in streams:
            wait_until("the engine is silent", lambda name=request_id: counted()[name]["events"] > 0)
            data = b""
            mark = (
                b"content_block_delta\ndata" if path == "/v1/messages" else b'"text":"' if "chat" not in path else b""
            )
            while True:
                made = counted()[request_id]
                # The double counts a token and then stands still before its event: the last one was never sent.
                sent = made["completion_tokens"] - 1
                had = data.count(mark) if mark else tokens_in(data)
                if made["events"] == int(request_id.rpartition("-")[2]) and had >= sent:
                    break
                data += answer.read1(65536)
        gateway.kill()
        for *_, connection, _ in streams:
            connection.close()
        gateway.start()
        address = gateway.environment["DATABASE_URL"]
        records = {
            row[0]: row[1:]
            for row in rows(address, "SELECT request_id, outcome, prompt_tokens, completion_tokens FROM usage_records")
        }
        for _, request_id, _, _ in streams:
            made = counted()[request_id]
            assert records[request_id] == ("lost", made["prompt_tokens"], made["completion_tokens"] - 1), made


def test_sqlite_survives_kills(tmp_path):
    prove(f"sqlite:///{tmp_path}/gateway.sqlite3", tmp_path, 15, seed=1)


@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_postgresql_survives_kills(tmp_path):
    with postgres() as server:
        prove(server.database(), tmp_path, 8, seed=2)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_sqlite_survives_500_kills(tmp_path):
    prove(f"sqlite:///{tmp_path}/gateway.sqlite3", tmp_path, KILLS, seed=int.from_bytes(os.urandom(2)))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_postgresql_survives_500_kills(tmp_path):
    with postgres() as server:
        prove(server.database(), tmp_path, KILLS, seed=int.from_bytes(os.urandom(2)))
