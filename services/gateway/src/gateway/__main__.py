"""`gateway serve | check | keys … | usage …`, from the environment alone."""

from __future__ import annotations

import json
import sys

from gateway import __version__
from gateway.settings import ConfigurationError, Settings, load

USAGE = """usage: gateway COMMAND

  serve      run the gateway (exit 0 after a drain, 2 for bad configuration)
  check      print the effective configuration with secrets hidden
  keys …     create, list, show, limit, disable, enable, rotate, delete keys
  usage …    who used how much
  --version  print the version
"""


def main(argv: list[str] | None = None) -> None:
    """Run one command and exit with its status: 0 done, 1 failed, 2 bad arguments or configuration."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: list[str]) -> int:
    """Run one command; returns the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in ("serve", "check", "keys", "usage"):
        print(f"gateway: no such command {command!r}\n\n{USAGE}" if command else USAGE, end="", file=sys.stderr)
        return 2
    if command in ("serve", "check") and rest:
        if rest[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        print(f"gateway: {command} takes no arguments; everything is set by environment variables\n\n{USAGE}",
              end="", file=sys.stderr)  # fmt: skip
        return 2
    try:
        settings = load()
    except ConfigurationError as error:
        for problem in error.problems:
            print(f"gateway: {problem}", file=sys.stderr)
        return 2
    return _dispatch(command, rest, settings)


def _dispatch(command: str, rest: list[str], settings: Settings) -> int:
    # Imported here: `keys` and `usage` start without the server's libraries.
    if command == "check":
        print(json.dumps(settings.hidden(), indent=2))
        return 0
    if command == "keys":
        from gateway import cli_keys

        return cli_keys.run(rest, settings)
    if command == "usage":
        from gateway import cli_usage

        return cli_usage.run(rest, settings)
    from gateway import app

    return app.serve(settings)


if __name__ == "__main__":
    main()
