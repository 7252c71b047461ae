"""Runs the checks and prints a table, or JSON. Exit 0: all passed; 1: something failed; 2: it cannot be asked."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable

import aiohttp

from tests.conformance import checks_errors, checks_stream
from tests.conformance.endpoint import Endpoint, Failed, Skipped

Check = Callable[[Endpoint], Awaitable[str]]


async def run(check: Check, endpoint: Endpoint) -> dict[str, str]:
    """One check: its name, what it expects, `pass`, `FAIL` or `skip`, and what was seen."""
    expected = " ".join((check.__doc__ or "").split()).rstrip(".")
    try:
        result, seen = "pass", await check(endpoint)
    except Skipped as reason:
        result, seen = "skip", str(reason)
    except Failed as failure:
        result, seen = "FAIL", str(failure)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        result, seen = "FAIL", f"the answer has not the expected shape ({type(error).__name__}: {error})"
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        result, seen = "FAIL", f"{type(error).__name__}: {error}"
    return {"check": check.__name__.replace("_", "-"), "expected": expected, "result": result, "seen": seen}


async def first_model(endpoint: Endpoint) -> str:
    """The first model that the endpoint offers."""
    try:
        answer = await endpoint.ask("/v1/models")
        return str(answer.json["data"][0]["id"])
    except (Failed, KeyError, IndexError, TypeError, aiohttp.ClientError, OSError, TimeoutError) as error:
        print(
            f"conformance: {endpoint.base}/v1/models tells no model ({error}); name one with MODEL=…", file=sys.stderr
        )
        raise SystemExit(2) from None


async def main(options: argparse.Namespace) -> int:
    """Run everything, one after the other."""
    verify = not options.insecure
    async with Endpoint(options.url, options.key or None, options.model or "", options.seconds, verify) as endpoint:
        endpoint.model = endpoint.model or await first_model(endpoint)
        checks: list[Check] = [*checks_stream.CHECKS, *checks_errors.CHECKS]
        checks += checks_errors.WITH_FAULTS if options.faults else ()
        rows = []
        for check in checks:
            rows.append(await run(check, endpoint))
            if not options.json:
                show(rows[-1])
    failed = sum(row["result"] == "FAIL" for row in rows)
    if options.json:
        print(json.dumps({"url": options.url, "model": endpoint.model, "failed": failed, "checks": rows}, indent=1))
    else:
        counts = {result: sum(row["result"] == result for row in rows) for result in ("pass", "FAIL", "skip")}
        print(f"\n{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} do not apply")
    return 1 if failed else 0


def show(row: dict[str, str]) -> None:
    """One line of the table."""
    seen = f"  [{row['seen']}]" if row["seen"] else ""
    print(f"{row['result']:4}  {row['check']:21} {row['expected']}{seen}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__)
    parser.add_argument("--url", default=os.environ.get("URL"), help="https://host[:port][/v1] (or URL=…)")
    parser.add_argument("--key", default=os.environ.get("KEY"), help="API key (or KEY=…)")
    parser.add_argument(
        "--model", default=os.environ.get("MODEL"), help="default: the first of /v1/models (or MODEL=…)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time for one answer")
    insecure = bool(os.environ.get("INSECURE"))
    parser.add_argument("--insecure", action="store_true", default=insecure, help="accept any certificate (INSECURE=1)")
    parser.add_argument("--json", action="store_true", default=bool(os.environ.get("JSON")), help="one object (JSON=1)")
    parser.add_argument("--faults", action="store_true", help="the engine behind is the vLLM double: break it too")
    arguments = parser.parse_args()
    if not arguments.url:
        parser.error("which endpoint? make conformance URL=https://host:port KEY=…")
    sys.exit(asyncio.run(main(arguments)))
