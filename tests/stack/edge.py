"""A client of the published HTTPS port that notes exactly what became of a call."""

import http.client
import json
import ssl
from dataclasses import dataclass, field

CAPITAL = "What is the capital of France? Answer in one sentence."
MODEL = "SmolLM2-135M-Instruct"


@dataclass
class Answer:
    """What a caller saw. `ended`: the whole answer came (`[DONE]`, or the last byte of the body)."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    usage: dict[str, int] | None = None
    events: list[str] = field(default_factory=list)
    ended: bool = False
    error: str = ""

    @property
    def request_id(self) -> str:
        """The id under which the ledger has the call."""
        return self.headers.get("x-request-id", "")

    def json(self) -> dict[str, object]:
        """The body."""
        return dict(json.loads(self.text))


@dataclass
class Edge:
    """One address; a connection for each call, so that a fault never hides in a kept one."""

    host: str
    port: int
    key: str = ""
    trust: str | None = None

    def connect(self, seconds: float = 60) -> http.client.HTTPSConnection:
        """A TLS connection; verified when `trust` holds the certificate (PEM)."""
        context = ssl.create_default_context(cadata=self.trust)
        if self.trust is None:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(self.host, self.port, timeout=seconds, context=context)

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        seconds: float = 60,
    ) -> Answer:
        """One call, read to its end; what breaks it is noted, not raised."""
        answer = Answer()
        sent = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        connection = self.connect(seconds)
        try:
            connection.request(
                method, path, json.dumps(body) if body is not None else None, {**sent, **(headers or {})}
            )
            response = connection.getresponse()
            answer.status = response.status
            answer.headers = {name.lower(): value for name, value in response.getheaders()}
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                self._read_stream(response, answer)
            else:
                answer.text = response.read().decode(errors="replace")
                answer.ended = True
                if answer.status == 200 and answer.text.startswith("{"):
                    answer.usage = json.loads(answer.text).get("usage")
        except (TimeoutError, OSError, http.client.HTTPException) as problem:
            answer.error = f"{type(problem).__name__}: {problem}"
        finally:
            connection.close()
        return answer

    def _read_stream(self, response: http.client.HTTPResponse, answer: Answer) -> None:
        for raw in response:
            line = raw.decode(errors="replace").strip()
            if not line.startswith("data:"):
                continue
            data = line.removeprefix("data:").strip()
            answer.events.append(data)
            if data == "[DONE]":
                answer.ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                answer.error = str(event["error"].get("code"))
            answer.usage = event.get("usage") or answer.usage
            for choice in event.get("choices", []):
                answer.text += choice.get("delta", {}).get("content") or ""

    def chat(self, prompt: str = CAPITAL, tokens: int = 32, stream: bool = False, seconds: float = 120) -> Answer:
        """One chat completion at temperature 0, usage asked for."""
        body: dict[str, object] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return self.call("POST", "/v1/chat/completions", body, seconds=seconds)

    def ready(self) -> bool:
        """Whether a call would be admitted."""
        return self.call("GET", "/ready", seconds=5).status == 200
