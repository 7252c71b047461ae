"""The sampler: one thread that takes samples for ever and publishes an immutable snapshot after each.

Readers take the snapshot without a lock. A failed sample publishes no GPU data: nothing stale is ever served.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from loguru import logger

from gpu_exporter.collector import Health, dcgm_labels, render_data
from gpu_exporter.keeper import CollectFailed
from gpu_exporter.links import LinkRates
from gpu_exporter.readings import Sample

# States by the error of the call that failed; anything else is `failed`.
STATE_OF = {
    "library_not_found": "no_driver",
    "driver_not_loaded": "no_driver",
    "lib_rm_version_mismatch": "driver_mismatch",
    "no_permission": "no_permission",
    "hung": "hung",
    "too_many_stuck_probes": "hung",
}
ADVICE = {
    "no_driver": "There is no NVIDIA driver here, or the container was started without it. The exporter keeps trying.",
    "no_gpu": "The driver is loaded and sees no GPU. The exporter keeps trying.",
    "driver_mismatch": "The driver was upgraded while its old kernel module is loaded. Reboot, or reload the module.",
    "access_lost": (
        "NVML says `Unknown Error` on start: a container loses its GPU devices when the host reloads systemd. Restart "
        "this container; for good, use CDI devices or the cgroupfs driver of the NVIDIA container toolkit."
    ),
    "no_permission": "This user may not open the GPU devices.",
    "hung": "A call into the driver does not return. See `call` and `gpu`; the system log says more (XID).",
    "failed": "The driver answered with an error.",
}
# XIDs are numbers of the driver's choice: at most so many different ones are kept, the rest counted as `other`.
MOST_XIDS = 256


class Source(Protocol):
    """Where samples come from: the keeper or the demo."""

    @property
    def replacements(self) -> int: ...
    @property
    def stuck(self) -> int: ...
    def sample(self, wake: int) -> Sample: ...
    def idle(self, seconds: float, wake: int) -> None: ...
    def renew(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a scrape serves: the page's data part, and when it stops being true (monotonic seconds)."""

    health: Health
    data: str = ""
    energy: Mapping[str, float] | None = None
    expires: float = 0.0


class Sampler:
    """Owns the source and the state between samples; all but `snapshot` and `stop` belongs to its thread."""

    def __init__(
        self,
        source: Source,
        *,
        interval: float,
        retry: float,
        allowance: float,
        expected: int,
        names: str,
        hostname: str,
        demo: bool,
        on_access_lost: Callable[[], None],
        on_death: Callable[[], None],
    ) -> None:
        self._source, self._interval, self._retry, self._allowance = source, interval, retry, allowance
        self._names, self._hostname = names, hostname
        self._on_access_lost, self._on_death = on_access_lost, on_death
        self._opened_once = False
        self._links = LinkRates()
        self._wake, self._waker = os.pipe()
        self.snapshot = Snapshot(Health(expected=expected, demo=demo))
        self.thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self.thread.start()

    def stop(self) -> None:
        """End sampling and the probe. A call that hangs is left behind."""
        os.write(self._waker, b"x")
        self.thread.join(timeout=5)

    def note_xids(self, events: list[tuple[str, int, int, float]]) -> None:
        """Count XIDs as (uuid, xid, how many, when). Called by the source, in the sampler's thread."""
        health = self.snapshot.health
        xids = dict(health.xids)
        for uuid, xid, count, at in events:
            index = health.gpus.get(uuid, (-1, ""))[0]
            key = (uuid, index, str(xid))
            if key not in xids and len(xids) >= MOST_XIDS:
                key = (uuid, index, "other")
            xids[key] = (xids.get(key, (0, 0.0))[0] + count, at)
            logger.warning("xid", uuid=uuid, gpu=index, xid=xid, count=count)
        self.snapshot = replace(self.snapshot, health=replace(health, xids=xids))

    def _run(self) -> None:
        try:
            self._sample_for_ever()
        except Exception:  # a bug: end the program, so that it is started again, rather than stand there without data
            logger.exception("sampler_died")
            self._on_death()

    def _sample_for_ever(self) -> None:
        next_at = time.monotonic()
        while True:
            started = time.monotonic()
            try:
                sample = self._source.sample(self._wake)
            except CollectFailed as failure:
                if failure.error == "interrupted":
                    break
                self._publish_failure(failure, time.monotonic() - started)
                pause = self._retry
            else:
                self._publish(sample, time.monotonic() - started)
                pause = self._interval if sample.gpus else self._retry
                if not sample.gpus:
                    self._source.renew()  # NVML lists the GPUs once, when it is opened
            next_at = max(next_at + pause, time.monotonic()) if pause == self._interval else time.monotonic() + pause
            self._source.idle(max(0.0, next_at - time.monotonic()), self._wake)
            if select.select([self._wake], [], [], 0)[0]:
                break
        self._source.close()

    def _publish(self, sample: Sample, took: float) -> None:
        self._opened_once = True
        before = self.snapshot.health
        sample = self._links.added(sample)
        gpus = dict(before.gpus)
        for uuid, (index, _) in before.gpus.items():
            gpus[uuid] = (index, "gone")
        named = {gpu.identity.uuid for gpu in sample.gpus}
        known = {index: uuid for uuid, (index, _) in before.gpus.items() if uuid not in named}
        unnamed: dict[int, str] = {}
        for gpu in sample.gpus:
            # A new probe does not know who a GPU is that it must not touch; we do, if it was ever read.
            if uuid := gpu.identity.uuid or known.get(gpu.identity.index, ""):
                gpus[uuid] = (gpu.identity.index, gpu.unreadable)
            else:
                unnamed[gpu.identity.index] = gpu.unreadable
        self._tell_changes(before, gpus, unnamed, len(sample.gpus))
        readable = [gpu for gpu in sample.gpus if not gpu.unreadable]
        now = time.time()
        health = self._health(
            state="ok" if sample.gpus else "no_gpu",
            success=bool(sample.gpus),
            finished_at=now,
            succeeded_at=now if sample.gpus else before.succeeded_at,
            duration=took,
            calls=sample.calls,
            visible=len(readable),
            expected=max(before.expected, len(gpus), len(sample.gpus)),
            gpus=gpus,
            unnamed=unnamed,
            dcgm_labels={
                **before.dcgm_labels,
                **{gpu.identity.uuid: dcgm_labels(gpu, sample, self._hostname) for gpu in readable},
            },
            failures=_added(before.failures, sample.failures),
        )
        energy = {gpu.identity.uuid: gpu.readings["energy"][0][0] for gpu in readable if "energy" in gpu.readings}
        self.snapshot = Snapshot(
            health,
            render_data(sample, self._names, self._hostname),
            energy,
            time.monotonic() + self._interval + self._allowance,
        )

    def _publish_failure(self, failure: CollectFailed, took: float) -> None:
        before = self.snapshot.health
        state = STATE_OF.get(failure.error, "failed")
        if failure.call == "nvmlInit" and failure.error == "unknown":
            state = "access_lost"
        if state != before.state:
            log = logger.info if state == "no_driver" and not before.gpus else logger.error
            log(
                "collect_failed",
                state=state,
                call=failure.call,
                error=failure.error,
                gpu=failure.gpu,
                advice=ADVICE[state],
            )
        health = self._health(
            state=state,
            success=False,
            finished_at=time.time(),
            hung_at=time.time() if state == "hung" else before.hung_at,
            duration=took,
            visible=0,
            failed_collects=before.failed_collects + 1,
            gpus={
                uuid: (index, why or ("hung" if state == "hung" and index == failure.gpu else "no_sample"))
                for uuid, (index, why) in before.gpus.items()
            },
            failures=_added(before.failures, {(failure.call, failure.error): 1}),
        )
        self.snapshot = Snapshot(health)
        if state == "access_lost" and self._opened_once:
            self._on_access_lost()

    def _health(self, **changes: object) -> Health:
        before = self.snapshot.health
        common = {
            "collects": before.collects + 1,
            "replacements": max(0, self._source.replacements),
            "stuck": self._source.stuck,
        }
        return replace(before, **{**common, **changes})  # type: ignore[arg-type]  # fields of Health, checked by it

    def _tell_changes(
        self, before: Health, gpus: Mapping[str, tuple[int, str]], unnamed: Mapping[int, str], listed: int
    ) -> None:
        if before.state != "ok" and listed:
            logger.info("collecting", gpus=listed, after=before.state)
        if before.state != "no_gpu" and not listed:
            logger.info("collect_failed", state="no_gpu", advice=ADVICE["no_gpu"])
        for index, why in unnamed.items():
            if why != before.unnamed.get(index):
                logger.error("gpu_unreadable", uuid="", gpu=index, reason=why)
        for uuid, (index, why) in gpus.items():
            _, previously = before.gpus.get(uuid, (index, "new"))
            if why and why != previously:
                logger.error("gpu_unreadable", uuid=uuid, gpu=index, reason=why)
            elif not why and previously == "new":
                logger.info("gpu_found", uuid=uuid, gpu=index)
            elif not why and previously and previously != "no_sample":
                logger.info("gpu_back", uuid=uuid, gpu=index, after=previously)


def _added(before: Mapping[tuple[str, str], int], more: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    total = dict(before)
    for key, count in more.items():
        total[key] = total.get(key, 0) + count
    return total
