"""`engine serve | fit | fetch | check`."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from typing import NoReturn

from loguru import logger

from engine import command, logs, place, settings


def main() -> None:
    """Run the program; exit 2 for a configuration that cannot work, with one line a problem on stderr."""
    parser = argparse.ArgumentParser(prog="engine", description="vLLM under watch.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("serve", help="run vLLM under its supervisor, in the foreground")
    verbs.add_parser("check", help="print the effective configuration and vLLM's command line, secrets hidden")
    arguments = parser.parse_args()
    try:
        configuration = settings.load()
        if arguments.verb == "check":
            _check(configuration)
        else:
            sys.exit(_serve(configuration))
    except settings.ConfigurationError as error:
        _refuse(error)


def _refuse(error: settings.ConfigurationError) -> NoReturn:
    for problem in error.problems:
        print(f"engine: {problem}", file=sys.stderr)
    sys.exit(2)


def _check(configuration: settings.Settings) -> None:
    there = place.found(configuration)
    print(json.dumps({"settings": configuration.hidden(), "argv": command.argv(configuration, there)}, indent=2))


def _serve(configuration: settings.Settings) -> int:
    from engine.metrics import Metrics
    from engine.status import StatusServer
    from engine.supervisor import Supervisor

    logs.configure(configuration.log_level)
    there = place.found(configuration)

    async def serve() -> int:
        metrics = Metrics()
        supervisor = Supervisor(configuration, there, metrics)
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

        async def nothing_to_fetch() -> None:
            return None

        try:
            await supervisor.run(nothing_to_fetch)
        finally:
            await page.stop()
        return 0

    return asyncio.run(serve())


if __name__ == "__main__":
    main()
