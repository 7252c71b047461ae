"""Callers that never stop, each noting what became of every call."""

import itertools
import secrets
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

from tests.stack.edge import Answer, Edge

CANARY = f"Canary{secrets.token_hex(6)}"  # in every prompt, and in nothing that is written anywhere
PAUSE_AFTER_FAILURE = 0.05  # seconds; an honest client would wait longer


@dataclass
class Call:
    """One call; times are `time.monotonic()`."""

    began: float
    stream: bool
    ended: float = 0.0
    answer: Answer = field(default_factory=Answer)

    @property
    def whole(self) -> bool:
        """Whether its caller saw the end of a good answer."""
        return self.answer.status == 200 and self.answer.ended and not self.answer.error

    @property
    def lost(self) -> bool:
        """Neither answered whole nor told honestly to come again."""
        return not self.whole and self.answer.status not in (429, 503)


class Load:
    """`callers` threads, every second call streamed. Use as a context; `calls` grows while it runs.

    A stream may be silent for 150 seconds, and `patience` is what a whole answer of that many tokens may take at most.
    """

    def __init__(self, edge: Edge, callers: int = 4, tokens: int = 12, patience: float = 150) -> None:
        self.edge, self.tokens, self.patience = edge, tokens, patience
        self.calls: list[Call] = []
        self._numbers = itertools.count()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call_for_ever) for _ in range(callers)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(self.patience + 30)
        if kind is None:
            assert not any(thread.is_alive() for thread in self._threads), "a call neither ended nor failed in time"

    def _call_for_ever(self) -> None:
        while not self._stop.is_set():
            number = next(self._numbers)
            call = Call(time.monotonic(), stream=number % 2 == 0)
            self.calls.append(call)
            prompt = f"Call {number}: name a city near {CANARY}."  # different prompts: no prefix cache hides the engine
            silent = 150 if call.stream else self.patience
            call.answer = self.edge.chat(prompt, tokens=self.tokens, stream=call.stream, seconds=silent)
            call.ended = time.monotonic()
            if not call.whole:
                self._stop.wait(PAUSE_AFTER_FAILURE)

    def under_way(self, when: float) -> list[Call]:
        """Calls that had begun and not ended at that moment."""
        return [call for call in list(self.calls) if call.began <= when and (not call.ended or call.ended > when)]

    def finished_since(self, when: float) -> list[Call]:
        """Calls that ended after that moment, well or not, in the order of their ends."""
        return sorted((call for call in list(self.calls) if call.ended > when), key=lambda call: call.ended)

    def whole_since(self, when: float) -> list[Call]:
        """Good answers to calls that began after that moment, in the order of their ends."""
        good = [call for call in list(self.calls) if call.began > when and call.ended and call.whole]
        return sorted(good, key=lambda call: call.ended)
