"""The program: read the configuration, sample in the background, serve until told to stop.

Exit status: 0 after SIGTERM or SIGINT, 1 when the sampler failed (a bug), 2 for bad configuration or an address that
cannot be bound, 3 when the GPU devices were lost and GPU_EXIT_ON_ACCESS_LOST asks for a restart.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from loguru import logger

from gpu_exporter import __version__
from gpu_exporter.demo import Demo
from gpu_exporter.keeper import Keeper
from gpu_exporter.logs import configure
from gpu_exporter.sampler import Sampler, Source
from gpu_exporter.server import Pages, Server
from gpu_exporter.settings import BadConfiguration, Settings, load

SAMPLER_DIED, BAD_CONFIGURATION, ACCESS_LOST = 1, 2, 3
USAGE = (
    "usage: gpu-exporter    serves /metrics and /health; takes no arguments: see docs/gpu-exporter.md for its variables"
)
# Python hands the interpreter over every 5 ms by default: a scrape would wait that long while a sample is rendered.
SWITCH_SECONDS = 0.0005


def main() -> None:
    """Run the program and exit with its status."""
    if arguments := sys.argv[1:]:
        asked = arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else BAD_CONFIGURATION)
    try:
        settings = load(os.environ)
    except BadConfiguration as error:
        for problem in error.problems:
            print(f"gpu-exporter: {problem}", file=sys.stderr)
        sys.exit(BAD_CONFIGURATION)
    configure(settings.log_level)
    sys.setswitchinterval(SWITCH_SECONDS)
    sys.exit(serve(settings))


def serve(settings: Settings) -> int:
    """Serve until a signal; the exit status."""
    stop = threading.Event()
    status = [0]

    def end(with_status: int) -> None:
        status[0] = with_status
        stop.set()

    sampler = _sampler(settings, end)
    pages = Pages(lambda: sampler.snapshot, sampler.thread.is_alive, settings.metric_names)
    try:
        server = Server(settings.gpu_exporter_host, settings.gpu_exporter_port, pages)
    except OSError as error:
        logger.error(
            "cannot_listen", host=settings.gpu_exporter_host, port=settings.gpu_exporter_port, reason=error.strerror
        )
        return BAD_CONFIGURATION
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sampler.start()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
    logger.info(
        "listening", host=settings.gpu_exporter_host, port=server.port, version=__version__, demo=settings.demo or None
    )
    stop.wait()
    logger.info("stopping", status=status[0])
    server.shutdown()
    server.server_close()
    sampler.stop()
    return status[0]


def _sampler(settings: Settings, end: Callable[[int], None]) -> Sampler:
    plan = settings.demo_plan
    source: Source
    if plan:
        source = Demo(plan)
        logger.warning("demo", gpus=plan.count, model=plan.model.name)
    else:
        source = Keeper(
            deadline=settings.gpu_deadline_seconds,
            open_deadline=settings.gpu_open_seconds,
            discover=settings.gpu_discover_seconds,
            options={"processes": settings.gpu_processes, "pcie_throughput": settings.gpu_pcie_throughput},
            on_xids=lambda events: sampler.note_xids(events),
        )
    sampler = Sampler(
        source,
        interval=settings.gpu_sample_seconds,
        retry=settings.gpu_retry_seconds,
        allowance=settings.gpu_deadline_seconds + 5,
        expected=settings.gpu_expected,
        names=settings.metric_names,
        hostname=settings.gpu_hostname,
        demo=plan is not None,
        on_access_lost=lambda: end(ACCESS_LOST) if settings.gpu_exit_on_access_lost else None,
        on_death=lambda: end(SAMPLER_DIED),
    )
    return sampler


if __name__ == "__main__":
    main()
