"""The keeper owns the probe process: starts it, asks it, and replaces it when the driver does not let it answer.

A process stuck in the driver may not even die of SIGKILL. It is then abandoned, counted, and reaped when the driver
lets go; no more than `MOST_STUCK` are left behind before the keeper waits instead of starting another. The last of
these places is for a probe that leaves out every GPU that hung: one that holds its probes must not hide the others.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger

from gpu_exporter.probe import PAGE_BYTES
from gpu_exporter.readings import Sample, decode

MOST_STUCK = 3
KILL_SECONDS = 1.0
MOST_BYTES = 32 * 1024 * 1024  # of one message: far above 16 GPUs with 36 links each
QUARANTINE_SECONDS = (60.0, 960.0)
RENEWAL_SECONDS = 600.0


class CollectFailed(Exception):
    """No sample. `call` is NVML's call that failed or hung, `error` why, `gpu` the index it was about, if any."""

    def __init__(self, call: str, error: str, gpu: int | None = None) -> None:
        super().__init__(f"{call}: {error}")
        self.call, self.error, self.gpu = call, error, gpu


class Probe:
    """One probe process and its pipe."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        descriptor = os.memfd_create("probe-page")
        os.ftruncate(descriptor, PAGE_BYTES)
        self._page = mmap.mmap(descriptor, PAGE_BYTES)
        arguments = json.dumps({**options, "page": descriptor, "parent": os.getpid()})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_exporter.probe", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
        )
        os.close(descriptor)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        os.set_blocking(self._out.fileno(), False)
        self._buffer = bytearray()

    def fileno(self) -> int:
        """What to wait on for messages."""
        return self._out.fileno()

    def ask(self, skip: list[int]) -> None:
        """Ask for one sample. Raises CollectFailed when the probe is gone."""
        try:
            self._in.write(json.dumps({"skip": skip}).encode() + b"\n")
            self._in.flush()
        except OSError:
            raise self.died() from None

    def messages(self) -> list[dict[str, Any]]:
        """The messages that have arrived. Raises CollectFailed when the probe is gone or talks nonsense."""
        try:
            data = os.read(self._out.fileno(), 1 << 20)
        except BlockingIOError:
            return []
        if not data:
            raise self.died()
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest
        if len(rest) > MOST_BYTES:
            raise CollectFailed("probe", "message_too_long")
        return [json.loads(entry) for entry in lines]

    def in_progress(self) -> tuple[str, int | None]:
        """The call that the probe announced last and the index of its GPU."""
        index, _, call = self._page[:].rstrip(b"\0").decode(errors="replace").partition(" ")
        return call or "start", int(index) if index.isdigit() else None

    def died(self) -> CollectFailed:
        """The failure that says how the process ended."""
        try:
            code = self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return CollectFailed("probe", "closed_its_pipe")
        call, gpu = self.in_progress()
        return CollectFailed(call, f"probe_died_of_signal_{-code}" if code < 0 else f"probe_exited_{code}", gpu)

    def kill(self) -> bool:
        """End the process. False when it did not die in time: it is stuck in the driver."""
        for end in (self._in, self._out):
            with contextlib.suppress(OSError):  # an unsent request to a dead process
                end.close()
        self.process.kill()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True


class Keeper:
    """Samples through a probe, whatever the driver does. All methods belong to one thread."""

    def __init__(
        self,
        *,
        deadline: float,
        open_deadline: float,
        discover: float,
        options: Mapping[str, Any],
        on_xids: Callable[[list[tuple[str, int, int, float]]], None],
        start: Callable[[Mapping[str, Any]], Probe] = Probe,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline, self._open_deadline, self._discover = deadline, open_deadline, discover
        self._options, self._on_xids, self._start, self._clock = dict(options), on_xids, start, clock
        self._probe: Probe | None = None
        self._census: tuple[Probe, float] | None = None
        self._next_census = 0.0
        self._seen: frozenset[str] = frozenset()
        self._last_census: frozenset[str] = frozenset()
        self._next_renewal = 0.0
        self._stuck: list[tuple[subprocess.Popen[bytes], int | None]] = []  # and the GPU that holds it
        self._quarantine: dict[int, tuple[float, float]] = {}  # index: until, how long
        self._failed_between: dict[tuple[str, str], int] = {}  # between two samples
        self.replacements = -1  # the first probe replaces none

    @property
    def stuck(self) -> int:
        """Processes that the driver holds and SIGKILL did not end."""
        self._stuck = [(process, gpu) for process, gpu in self._stuck if process.poll() is None]
        return len(self._stuck)

    def sample(self, wake: int) -> Sample:
        """One sample within the deadline. Raises CollectFailed; the next call then starts with a new probe.

        It is given up at once, as `interrupted`, when the descriptor `wake` becomes readable.
        """
        try:
            probe = self._ready(wake)
            probe.ask(self._left_out())
            sample = decode(self._await(probe, "sample", self._clock() + self._deadline, wake))
        except CollectFailed as failure:
            self.renew()
            if failure.error == "hung" and failure.gpu is not None:
                self._isolate(failure.gpu)
            raise
        except (KeyError, TypeError, ValueError) as error:
            self.renew()
            raise CollectFailed("probe", "talks_nonsense") from error
        for gpu in sample.gpus:
            if not gpu.unreadable:
                self._quarantine.pop(gpu.identity.index, None)
        self._seen = frozenset(gpu.identity.uuid for gpu in sample.gpus if not gpu.unreadable)
        if self._failed_between:
            sample = Sample(
                sample.driver,
                sample.gpus,
                {**sample.failures, **self._failed_between},
                sample.calls,
                sample.duration,
            )
            self._failed_between = {}
        return sample

    def idle(self, seconds: float, wake: int) -> None:
        """Pass on XIDs for `seconds`, or until the descriptor `wake` is readable; look for new GPUs meanwhile."""
        until = self._clock() + seconds
        while (left := until - self._clock()) > 0:
            self._take_census()
            with selectors.DefaultSelector() as selector:
                selector.register(wake, selectors.EVENT_READ)
                if self._probe:
                    selector.register(self._probe, selectors.EVENT_READ)
                if self._census:
                    selector.register(self._census[0], selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(min(left, 1.0))]
            if wake in ready:
                return
            if self._census and self._census[0] in ready:
                self._finish_census()
            if self._probe and self._probe in ready:
                try:
                    for message in self._probe.messages():
                        self._pass_on(message)
                except CollectFailed as failure:  # nobody asked for anything: no sample would tell of it
                    logger.warning("probe_ended", call=failure.call, error=failure.error)
                    self._count_between(failure.call, failure.error)
                    self.renew()
                except ValueError:
                    self.renew()  # the next sample starts a new one and reports what is wrong then

    def renew(self) -> None:
        """Give up the probe; the next sample starts another."""
        if self._probe:
            self._end(self._probe)
            self._probe = None

    def close(self) -> None:
        """End every process that can be ended."""
        self.renew()
        if self._census:
            self._end(self._census[0])
            self._census = None

    def _ready(self, wake: int) -> Probe:
        if self._probe is None:
            if self.stuck >= MOST_STUCK:
                raise CollectFailed("start", "too_many_stuck_probes")
            self.replacements += 1
            self._probe = self._start({**self._options, "census": False})
            self._await(self._probe, "opened", self._clock() + self._open_deadline, wake)
            self._next_census = self._clock() + self._discover
        return self._probe

    def _await(self, probe: Probe, kind: str, deadline: float, wake: int) -> Any:
        with selectors.DefaultSelector() as selector:
            selector.register(probe, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while (left := deadline - self._clock()) > 0:
                if wake in (key.fileobj for key, _ in selector.select(left)):
                    raise CollectFailed("exporter", "interrupted")
                answer = None
                for message in probe.messages():
                    if "failed" in message:
                        raise CollectFailed(message["failed"]["call"], message["failed"]["error"])
                    if kind in message:
                        answer = message[kind]
                    self._pass_on(message)
                if answer is not None:
                    return answer
        call, gpu = probe.in_progress()
        raise CollectFailed(call, "hung", gpu)

    def _pass_on(self, message: Mapping[str, Any]) -> None:
        if "xids" in message:
            self._on_xids([(str(u), int(x), int(n), float(t)) for u, x, n, t in message["xids"]])
        if "listening_failed" in message:
            self._count_between(str(message["listening_failed"]["call"]), str(message["listening_failed"]["error"]))

    def _count_between(self, call: str, error: str) -> None:
        self._failed_between[call, error] = self._failed_between.get((call, error), 0) + 1

    def _isolate(self, index: int) -> None:
        """Leave a GPU that hangs out of the next samples, for longer each time, so that the others stay visible."""
        _, last = self._quarantine.get(index, (0.0, QUARANTINE_SECONDS[0] / 2))
        pause = min(last * 2, QUARANTINE_SECONDS[1])
        self._quarantine[index] = (self._clock() + pause, pause)

    def _left_out(self) -> list[int]:
        """The GPUs not to ask now: in quarantine, or holding a probe, or, at the last place, any that hung."""
        now, last = self._clock(), self.stuck >= MOST_STUCK - 1
        holding = {gpu for _, gpu in self._stuck}
        return [gpu for gpu, (until, _) in self._quarantine.items() if last or now < until or gpu in holding]

    def _take_census(self) -> None:
        now = self._clock()
        if self._census:
            if now > self._census[1]:
                self._end(self._census[0])
                self._census = None
        elif self._discover and self._probe and now >= self._next_census and self.stuck < MOST_STUCK - 1:
            self._next_census = now + self._discover
            options = {**self._options, "census": True, "skip": self._left_out()}
            self._census = (self._start(options), now + self._open_deadline)

    def _finish_census(self) -> None:
        """A process of its own sees the GPUs of now; NVML in the probe knows those of its own start."""
        assert self._census
        probe = self._census[0]
        try:
            for message in probe.messages():
                if "census" in message:
                    self._compare(frozenset(message["census"]))
                if "census" not in message and "failed" not in message:
                    continue
                self._end(probe)
                self._census = None
                return
        except (CollectFailed, ValueError):
            self._end(probe)
            self._census = None

    def _compare(self, census: frozenset[str]) -> None:
        """Start a new probe when the census has a GPU that the probe does not read.

        A GPU that answers the census and yet gives no data (it hangs in other calls) is no news every time.
        """
        unread, news = census - self._seen, census != self._last_census
        self._last_census = census
        if unread and (news or self._clock() >= self._next_renewal):
            self._next_renewal = self._clock() + RENEWAL_SECONDS
            self.renew()

    def _end(self, probe: Probe) -> None:
        if not probe.kill():
            self._stuck.append((probe.process, probe.in_progress()[1]))
