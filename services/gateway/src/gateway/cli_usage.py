"""`gateway usage`: who used how much, as a table, CSV or JSON."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from datetime import date

import msgspec

from gateway.cli_keys import table
from gateway.settings import Settings
from gateway.store import Database, StoreNewer, StoreUnavailable, migrate, reports


def run(argv: Sequence[str], settings: Settings) -> int:
    """Print usage; returns the exit status: 0, or 2 if the database cannot be read."""
    parser = argparse.ArgumentParser(prog="gateway usage", description="Tokens and requests, from the daily totals.")
    parser.add_argument("--by", choices=tuple(reports.GROUPS), default="key", help="one row for each (key)")
    parser.add_argument("--from", dest="first", type=_day, metavar="DAY", help="first day, like 2030-01-31")
    parser.add_argument("--to", dest="last", type=_day, metavar="DAY", help="last day, included")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object, as over HTTP")
    form.add_argument("--csv", action="store_true", help="comma-separated, with a head line")
    arguments = parser.parse_args(argv)
    database = Database(settings.database_url, busy_seconds=10.0)
    try:
        with database.session():
            migrate(database)
            rows = reports.usage(database, arguments.first, arguments.last, arguments.by)
    except (StoreUnavailable, StoreNewer) as error:
        print(f"usage: DATABASE_URL: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(msgspec.json.encode({"data": rows}).decode())
        return 0
    head = reports.columns(arguments.by)
    cells = [["" if value is None else str(value) for value in row.values()] for row in rows]
    if arguments.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([head, *cells])
    elif rows:
        table(cells, head)
    else:
        print("(none)")
    return 0


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError("must be a day like 2030-01-31") from None
