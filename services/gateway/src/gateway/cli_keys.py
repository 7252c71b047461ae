"""`gateway keys …`: the same changes as over HTTP, made on the database while the gateway runs."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from gateway.account import Days
from gateway.errors import GatewayError
from gateway.keys import LIMIT_NAMES, Key, KeyFields, OrganisationFields, RotateFields
from gateway.settings import Settings
from gateway.store import Database, StoreNewer, StoreUnavailable, accounts, migrate, reports

Answer = dict[str, Any]


def run(argv: Sequence[str], settings: Settings) -> int:
    """Run one command; returns the exit status: 0, 1 (refused), 2 (cannot be done; wrong use exits by itself)."""
    arguments = _parser().parse_args(argv)
    arguments.settings = settings
    database = Database(settings.database_url, busy_seconds=10.0)
    work: Callable[[Database, argparse.Namespace], Answer] = arguments.work
    try:
        with database.session():
            migrate(database)
            answer = work(database, arguments)
    except GatewayError as error:
        if arguments.json:
            print(error.json().decode())
        else:
            print(f"keys: {error.message}", file=sys.stderr)
        return 1
    except (StoreUnavailable, StoreNewer) as error:
        print(f"keys: DATABASE_URL: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(msgspec.json.encode(answer).decode())
    else:
        _show(answer)
    return 0


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user has no name
        return "cli"


# Commands


def _create(database: Database, arguments: argparse.Namespace) -> Answer:
    key, secret = accounts.create(database, _changes(arguments), _actor())
    return {**key.public(), "secret": secret}


def _list(database: Database, _: argparse.Namespace) -> Answer:
    return {"data": [key.public() for key in accounts.keys(database)]}


def _show_one(database: Database, arguments: argparse.Namespace) -> Answer:
    key = accounts.key(database, arguments.id)
    return {**key.public(), "usage": _usage(database, key, arguments.settings)}


def _usage(database: Database, key: Key, settings: Settings) -> Answer:
    """As over HTTP, from the ledger alone: what running calls hold only the gateway knows, so `held_tokens` is null."""
    days = Days(settings.quota_timezone)
    day = days.today()
    tokens, requests = reports.used(database, day, "key_id", key.id)
    organisation = None
    if key.organisation is not None:
        quota = {of["name"]: of["daily_tokens"] for of in accounts.organisations(database)}.get(key.organisation)
        of_all, _ = reports.used(database, day, "organisation", key.organisation)
        organisation = {"name": key.organisation, **_quota(of_all, quota or 0)}
    return {
        "key_id": key.id,
        "day": day,
        **_quota(tokens, key.caller(settings).limits.daily_tokens),
        "resets_at": int(days.resets_at()),
        "requests": requests,
        "organisation": organisation,
    }


def _quota(used: int, limit: int) -> Answer:
    return {
        "used_tokens": used,
        "held_tokens": None,
        "limit_tokens": limit or None,
        "remaining_tokens": max(0, limit - used) if limit else None,
    }


def _limit(database: Database, arguments: argparse.Namespace) -> Answer:
    changes = _changes(arguments)
    if not changes:
        arguments.wrong("give at least one thing to change, like --daily-tokens N")
    return accounts.change(database, arguments.id, changes, _actor()).public()


def _disable(database: Database, arguments: argparse.Namespace) -> Answer:
    return accounts.set_disabled(database, arguments.id, True, _actor()).public()


def _enable(database: Database, arguments: argparse.Namespace) -> Answer:
    return accounts.set_disabled(database, arguments.id, False, _actor()).public()


def _rotate(database: Database, arguments: argparse.Namespace) -> Answer:
    grace = RotateFields(arguments.grace_seconds).seconds()
    return {"id": arguments.id, "secret": accounts.rotate(database, arguments.id, grace, _actor())}


def _delete(database: Database, arguments: argparse.Namespace) -> Answer:
    accounts.delete(database, arguments.id, _actor())
    return {"id": arguments.id, "deleted": True}


def _organisations(database: Database, _: argparse.Namespace) -> Answer:
    return {"data": accounts.organisations(database)}


def _organisation(database: Database, arguments: argparse.Namespace) -> Answer:
    tokens = OrganisationFields(arguments.daily_tokens).tokens()
    return accounts.set_organisation(database, arguments.name, tokens, _actor())


def _audit(database: Database, _: argparse.Namespace) -> Answer:
    return {"data": reports.audit(database)}


# Arguments


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in KeyFields.__struct_fields__ if hasattr(arguments, name)}
    return KeyFields(**given).changes()


def _count(text: str) -> int | None:
    if text in ("default", "null"):
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("must be a number of at least 0, or 'default'")
    return int(text)


def _moment(text: str) -> float | str | None:
    if text in ("never", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _names(text: str) -> list[str] | None:
    return None if text in ("all", "null") else [name for name in text.split(",") if name.strip()]


def _text(text: str) -> str | None:
    return None if text in ("none", "null") else text


def _limits(parser: argparse.ArgumentParser, *, name_required: bool) -> None:
    missing = argparse.SUPPRESS  # what is not given is not changed
    parser.add_argument("--name", required=name_required, default=missing, help="what people call the key")
    for limit in LIMIT_NAMES:
        parser.add_argument(
            f"--{limit.replace('_', '-')}", dest=limit, type=_count, default=missing, metavar="N",
            help="0 = no limit, 'default' = the environment's default",
        )  # fmt: skip
    parser.add_argument("--models", type=_names, default=missing, metavar="A,B", help="allowed models, or 'all'")
    parser.add_argument("--priority", choices=("high", "normal", "low"), default=missing)
    parser.add_argument("--weight", type=_count, default=missing, metavar="N", help="share of the engine, 1 to 1000")
    parser.add_argument(
        "--expires-at", type=_moment, default=missing, metavar="TIME", help="Unix seconds, ISO 8601 or 'never'"
    )
    parser.add_argument("--organisation", type=_text, default=missing, metavar="NAME", help="or 'none'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway keys", description="Keys and their limits.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work: Callable[..., Answer], told: str, *, with_id: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=told)
        added.add_argument("--json", action="store_true", help="one JSON object, as over HTTP")
        added.set_defaults(work=work, wrong=added.error)
        if with_id:
            added.add_argument("id", metavar="ID")
        return added

    _limits(command("create", _create, "make a key; its secret is shown once"), name_required=True)
    command("list", _list, "all keys")
    command("show", _show_one, "one key and what it used today (calls that run are not in it yet)", with_id=True)
    _limits(command("limit", _limit, "change limits and names", with_id=True), name_required=False)
    command("disable", _disable, "refuse a key and end its running calls", with_id=True)
    command("enable", _enable, "accept a disabled key again", with_id=True)
    rotate = command("rotate", _rotate, "a new secret for a key", with_id=True)
    rotate.add_argument(
        "--grace-seconds", type=float, default=0.0, metavar="N", help="time the old secret stays valid (0)"
    )
    command("delete", _delete, "revoke a key for ever; its usage stays", with_id=True)
    command("organisations", _organisations, "all organisations")
    organisation = command("organisation", _organisation, "give an organisation a quota over all its keys")
    organisation.add_argument("name")
    organisation.add_argument("--daily-tokens", type=_count, required=True, metavar="N", help="0 = none")
    command("audit", _audit, "the newest changes")
    return parser


# Telling


def _show(answer: Answer) -> None:
    rows = answer.get("data")
    if rows is None:
        _show_fields(answer)
        if "secret" in answer:
            print("The secret is shown only now.", file=sys.stderr)
        return
    if not rows:
        print("(none)")
        return
    table([[_cell(value) for value in row.values()] for row in rows], list(rows[0]))


def _show_fields(answer: Answer, above: str = "") -> None:
    for name, value in answer.items():
        if isinstance(value, dict):
            _show_fields(value, f"{above}{name} ")
        else:
            print(f"{above + name:34} {_cell(value)}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def table(rows: list[list[str]], head: list[str]) -> None:
    """Print columns that line up."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for line in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
