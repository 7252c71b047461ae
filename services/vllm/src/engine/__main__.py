"""`engine serve | node | fit | fetch | check`."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from typing import NoReturn

from loguru import logger

from engine import command, logs, place, preflight, report, settings


def main() -> None:
    """Run the program; exit 2 for a configuration that cannot work, with one line a problem on stderr."""
    parser = argparse.ArgumentParser(prog="engine", description="vLLM under watch.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("serve", help="run vLLM under its supervisor, in the foreground")
    verbs.add_parser("node", help="give this machine's GPUs to a model that another machine serves, in the foreground")
    verbs.add_parser("check", help="print the effective configuration and vLLM's command line, secrets hidden")
    fetching = verbs.add_parser("fetch", help="bring a model here, whole and checked; goes on where it stopped")
    fetching.add_argument("model", nargs="?", help="default: MODEL_NAME")
    fitting = verbs.add_parser("fit", help="does a model fit this machine's GPUs? exit 0 yes, 1 no")
    fitting.add_argument("model", nargs="?", help="hub name or folder; default: MODEL_NAME")
    fitting.add_argument(
        "--gpu-memory", type=_gib, metavar="GIB", help="memory of each GPU; default: ask NVIDIA's driver"
    )
    fitting.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    try:
        configuration = settings.load()
        if arguments.verb == "check":
            _check(configuration)
        elif arguments.verb == "fetch":
            _fetch(configuration, arguments.model)
        elif arguments.verb == "fit":
            sys.exit(report.run(configuration, arguments.model, arguments.gpu_memory, arguments.json))
        else:
            sys.exit(_serve(configuration, arguments.verb == "node"))
    except settings.ConfigurationError as error:
        _refuse(error)


def _gib(text: str) -> float:
    value = float(text)
    if not 0 < value < 1_000_000:
        raise argparse.ArgumentTypeError("must be GiB above 0")
    return value


def _refuse(error: settings.ConfigurationError) -> NoReturn:
    for problem in error.problems:
        print(f"engine: {problem}", file=sys.stderr)
    sys.exit(2)


def _check(configuration: settings.Settings) -> None:
    there = place.found(configuration)
    print(json.dumps({"settings": configuration.hidden(), "argv": command.argv(configuration, there)}, indent=2))


def _fetch(configuration: settings.Settings, name: str | None) -> None:
    from engine.fetch import FetchError, fetch

    def say(line: str) -> None:
        print(f"engine fetch: {line}", flush=True)

    chosen = name or configuration.model_name
    if chosen is None:
        chosen = place.model_name(configuration, place.device(configuration, place.python(configuration)))
    try:
        say(f"ready: {fetch(configuration, chosen, say)}")
    except FetchError as error:
        print(f"engine fetch: {error}", file=sys.stderr)
        sys.exit(1)


def _serve(configuration: settings.Settings, as_node: bool) -> int:
    from engine.metrics import Metrics
    from engine.node import Node
    from engine.status import StatusServer
    from engine.supervisor import Supervisor

    logs.configure(configuration.log_level)
    there = place.found(configuration)
    (preflight.check_node if as_node else preflight.check)(configuration, there)

    async def serve() -> int:
        metrics = Metrics()
        supervisor = (Node if as_node else Supervisor)(configuration, there, metrics)
        page = StatusServer(supervisor.status, metrics)
        host = configuration.engine_status_host
        try:
            port = await page.start(host, configuration.engine_status_port)
        except OSError as error:
            raise settings.ConfigurationError(
                [f"ENGINE_STATUS_PORT: cannot listen on {host}:{configuration.engine_status_port}: {error.strerror}"]
            ) from None
        logger.bind(host=host, port=port).info("status_listening")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop)
        loop.add_signal_handler(signal.SIGHUP, supervisor.retry)

        try:
            await supervisor.run()
        finally:
            await page.stop()
        return 0

    return asyncio.run(serve())


if __name__ == "__main__":
    main()
