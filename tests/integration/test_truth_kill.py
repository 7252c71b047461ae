"""`kill -9` of the gateway at random instants under mixed load: what a client saw ended is recorded, once and rightly."""

import http.client
import json
import os
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.doubles.gateway import KEY, GatewayProcess
from tests.doubles.postgres import postgres, programs
from tests.doubles.vllm import VllmDouble

from gateway.store import Database

CLIENTS = 10


@dataclass
class Seen:
    """What the clients saw: the usage of answers that ended, by request id; and everything that was sent."""

    ended: dict[str, tuple[int, int]] = field(default_factory=dict)
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
            thread.join(20)
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
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", "x-request-id": request_id}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if kind == "abort":
                answer.read(chance.randint(1, 600))
                if connection.sock is not None:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                return
            data = answer.read()
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


def rows(url: str, sql: str) -> list[Any]:
    """Read the gateway's database as an outsider."""
    database = Database(url)
    with database.session():
        return database.rows(sql)


def prove(address: str, kills: int, seed: int) -> None:
    """Kill the gateway `kills` times under load; after every start, and at the end, the ledger must be right."""
    chance = random.Random(seed)
    seen = Seen()
    with VllmDouble(model="double") as engine:
        with GatewayProcess(VLLM_URL=engine.url, DATABASE_URL=address) as gateway:
            for number in range(kills):
                load = Load(gateway.port, seed * 1000 + number, seen)
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
        assert len(seen.ended) > kills, "the load was too thin to prove anything"
        wrong = {i: (usage, records.get(i)) for i, usage in seen.ended.items() if records.get(i) != (*usage, "ok")}
        assert not wrong, (
            f"{len(wrong)} of {len(seen.ended)} ended answers are not in the ledger as the client saw them: {wrong}"
        )
        # Nothing that the engine worked on is missing, nothing is charged that it did not do.
        missing, invented, behind = [], [], 0
        for request in engine.requests():
            record = records.get(request["request_id"])
            if record is None:
                missing.append(request)
                continue
            counted = request["prompt_tokens"] + request["completion_tokens"]
            settled = record[0] + record[1]
            if record[2] in ("ok",):
                assert counted == settled, (request, record)
            elif settled > counted:
                invented.append((request, record))
            behind += counted - settled
        assert not missing, f"{len(missing)} calls reached the engine and left no record: {missing[:3]}"
        assert not invented, invented[:3]
        lost = sum(record[2] == "lost" for record in records.values())
        assert behind <= (lost + sum(r[2] == "cancelled" for r in records.values())) * 64
        totals = rows(
            address, "SELECT SUM(prompt_tokens + completion_tokens), SUM(requests + refusals) FROM daily_totals"
        )[0]
        assert (int(totals[0]), int(totals[1])) == (sum(r[0] + r[1] for r in records.values()), len(records))
        print(
            f"{kills} kills: {len(seen.sent)} calls sent, {len(seen.ended)} seen to end, {len(records)} records, "
            f"{lost} lost, {behind} tokens of unfinished calls not seen by the gateway"
        )


def test_sqlite_survives_kills(tmp_path):
    prove(f"sqlite:///{tmp_path}/gateway.sqlite3", 25, seed=1)


@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_postgresql_survives_kills():
    with postgres() as server:
        prove(server.database(), 8, seed=2)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_sqlite_survives_500_kills(tmp_path):
    prove(f"sqlite:///{tmp_path}/gateway.sqlite3", 500, seed=int.from_bytes(os.urandom(2)))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.skipif(programs() is None, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)")
def test_postgresql_survives_500_kills():
    with postgres() as server:
        prove(server.database(), 500, seed=int.from_bytes(os.urandom(2)))
