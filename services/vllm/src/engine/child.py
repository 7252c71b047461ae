"""One run of vLLM: started under the guard in a session of its own, listened to, signalled, and always ended whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from engine import family, logs

LINES_KEPT = 200
_LONGEST_LINE = 65536


class Child:
    """A running vLLM. The supervisor owns it alone; `lines` are the last lines it printed."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        life_line: int,
        output: asyncio.StreamReader,
        on_line: Callable[[str], None],
    ) -> None:
        """Use `start`."""
        self._process = process
        self._life_line: int | None = life_line
        self._output = output
        self._on_line = on_line
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._held: set[str] = set()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, argv: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]) -> Child:
        """Start `argv` with the environment `env`, under the guard; `on_line` hears every line it prints."""
        guard = [sys.executable, "-m", "engine.guard", "--", *argv]
        # Pipes of our own: asyncio's wait() waits for its pipes too, and an orphan may hold these open for ever.
        life_read, life_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *guard,
                stdin=life_read,  # never written to, closed by our death
                stdout=output_write,
                stderr=output_write,
                start_new_session=True,
                env=dict(env),
            )
        except BaseException:
            os.close(life_write)
            os.close(output_read)
            raise
        finally:
            os.close(life_read)
            os.close(output_write)
        output = asyncio.StreamReader(limit=_LONGEST_LINE)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(output_read, "rb", 0)
        )
        return cls(process, life_write, output, on_line)

    @property
    def session(self) -> int:
        """The guard's process id, which is the session's."""
        return self._process.pid

    def members(self) -> list[family.Process]:
        """vLLM's processes: all of the session but the guard."""
        return [process for process in family.members(self.session, self.session) if process.state != "Z"]

    def note_shared_memory(self) -> None:
        """Remember the shared memory in use, should the guard die before it can clean up."""
        self._held |= family.shared_memory([process.pid for process in self.members()])

    def drain(self) -> None:
        """Ask the API server to finish the running calls and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Wait for the end of the guard; its exit code (128 + signal when vLLM was killed)."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    async def sweep(self) -> None:
        """Whatever the guard did or could not do: nobody of the session lives on, and no shared memory stays behind."""
        if self._life_line is not None:
            os.close(self._life_line)  # the guard kills the family and cleans up
            self._life_line = None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), 15)
        await asyncio.to_thread(family.kill, self.session)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        await asyncio.to_thread(family.kill_adopted)
        await asyncio.to_thread(family.unlink_abandoned, self._held)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._reader, 2)  # the last lines tell why it ended

    async def _read(self) -> None:
        while True:
            try:
                raw = await self._output.readline()
            except ValueError:  # longer than the limit: the stream has dropped it
                continue
            if not raw:
                return
            # A progress bar redraws its line; its last state is what it says.
            text = raw.decode("utf-8", "replace").rstrip().rpartition("\r")[2].strip()
            if text:
                said = logs.relay(text)
                self.lines.append(said)
                self._on_line(said)
