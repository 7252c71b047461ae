"""One soak: a site, callers, deeds and samples for a stated time; then the verdict.

`SOAK_DATABASE=postgresql` runs it on PostgreSQL. The result is a dictionary of plain values, as `docs/soak.md` shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from tests.doubles.waiting import wait_until
from tests.doubles.wall_clock import WallClock
from tests.soak.deeds import Deeds
from tests.soak.sampling import Sample, Sampler, slope
from tests.soak.site import HOLD_SECONDS, RETENTION_DAYS, SETTINGS, Site, site
from tests.soak.traffic import Callers
from tests.soak.truth import Watcher

MEGABYTE = 1_000_000
DAY = 86_400
LEAST_SAMPLES = 12
ZONE = ZoneInfo(SETTINGS["QUOTA_TIMEZONE"])


@dataclass(frozen=True)
class Plan:
    """How long and how hard. `day_seconds`: real seconds a day of the fast clock takes."""

    seconds: float
    day_seconds: float
    rate: float
    people: int
    restarts_until: float
    warm_seconds: float  # of the last life of the gateway, before growth is judged
    daily_tokens: int  # of the key whose quota ends every day
    every: dict[str, float]
    seed: int = 1

    @property
    def factor(self) -> int:
        """Told seconds a real second."""
        return round(DAY / self.day_seconds)


SHORT = Plan(
    seconds=42, day_seconds=14, rate=25, people=14, restarts_until=16, warm_seconds=8,
    daily_tokens=400,
    every={"keys": 0.6, "parallel keys": 5, "backup": 6, "engine restart": 13, "engine kill": 15, "engine hang": 17,
           "gateway restart": 6, "gateway kill": 5, "reload": 12},
)  # fmt: skip
LONG = Plan(
    seconds=3600, day_seconds=600, rate=22, people=14, restarts_until=780, warm_seconds=1500,
    daily_tokens=20_000,
    every={"keys": 2.5, "parallel keys": 30, "backup": 60, "engine restart": 170, "engine kill": 190,
           "engine hang": 150, "gateway restart": 100, "gateway kill": 90, "reload": 240},
)  # fmt: skip


async def soak(folder: Path, plan: Plan, database: str | None = None) -> dict[str, Any]:
    """Run `plan` in `folder` and return what was measured and what was found wrong (`problems`, empty when all held)."""
    # The clock begins an hour before midnight where the quota's day turns, in a summer long before now.
    began = dt.datetime(2026, 6, 1, 23, 0, tzinfo=ZONE).timestamp()
    clock = WallClock(folder, factor=plan.factor, began_wall=began)
    with contextlib.ExitStack() as stack:
        running = await asyncio.to_thread(stack.enter_context, site(folder, clock, database))
        keys = await asyncio.to_thread(Deeds.steady, running, plan.daily_tokens)
        sampler, watcher = Sampler(running), Watcher(running)
        callers = Callers(running, keys, plan.rate, plan.people, plan.seed)
        deeds = Deeds(running, keys, plan.seed)
        watching = [asyncio.create_task(sampler.run()), asyncio.create_task(watcher.run())]
        started = time.monotonic()
        callers.start()
        deeds.start(plan.restarts_until, plan.every)
        await asyncio.wait(watching, timeout=plan.seconds, return_when=asyncio.FIRST_EXCEPTION)
        # Where starts are slow the last life began late: it gets its time all the same.
        for _ in range(90):
            if any(task.done() for task in watching) or len(steady(plan, sampler.samples)) >= LEAST_SAMPLES:
                break
            await asyncio.wait(watching, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
        assert not any(task.done() for task in watching), "a watcher died"
        samples = list(sampler.samples)
        await deeds.stop()
        await callers.stop()
        seconds = time.monotonic() - started
        problems = await asyncio.to_thread(_rest, running, watcher)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        status = await asyncio.to_thread(running.gateway.terminate)
        if status != 0:
            problems.append(f"the gateway ended with {status}")
        await asyncio.to_thread(watcher.read)
        running.engine.stop()
        result = {
            "seconds": round(seconds),
            "database": "PostgreSQL" if database else "SQLite",
            "factor": plan.factor,
            "calls": sum(callers.seen.kinds.values()),
            "kinds": dict(callers.seen.kinds.most_common()),
            "answers": dict(callers.seen.answers.most_common()),
            "codes": dict(callers.seen.codes.most_common()),
            "broken": callers.seen.broken,
            "deeds": dict(deeds.done),
            "lives": running.gateway.lives,
            "problems": [*problems, *deeds.problems, *callers.seen.wrong],
        }
        judge_truth(result, plan, running, watcher, callers, deeds)
        judge_growth(result, plan, samples)
        judge_logs(result, running)
        return result


def _rest(running: Site, watcher: Watcher) -> list[str]:
    """Nothing runs, waits or is held any more."""
    problems = []
    for what, resting in (
        ("the engine works on", lambda: not (s := running.engine.state())["running"] and not s["waiting"]),
        ("holds are left", lambda: watcher.holds() == 0),
        ("holds are in memory", lambda: _metric(running, "gateway_holds") == 0),
        ("calls are in flight", lambda: _metric(running, "gateway_in_flight_calls") == 0),
        ("records wait in the spool", lambda: _metric(running, "gateway_ledger_spool_records") == 0),
    ):
        try:
            wait_until(what, resting)
        except AssertionError as problem:
            problems.append(str(problem))
    return problems


def _metric(running: Site, name: str) -> float:
    lines = running.gateway.get("/metrics", key=None).body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + " "))


def judge_truth(
    result: dict[str, Any], plan: Plan, running: Site, watcher: Watcher, callers: Callers, deeds: Deeds
) -> None:
    """The ledger equals the engine's journal and what callers were told; quotas held on every day."""
    problems = result["problems"]
    found = watcher.compare(running.engine.lines(), callers.seen.ended)
    for name in ("different", "invented", "missing", "unseen"):
        wrong = getattr(found, name)
        if wrong:
            problems.append(f"ledger, {name}: {len(wrong)}, e.g. {wrong[:3]}")
    if watcher.twice:
        problems.append(f"recorded twice: {watcher.twice[:3]}")
    # What the killed engine could not write down: at most what was in it, and what it ended in its last moment.
    if found.unwitnessed > deeds.engine_kills * 2 * int(SETTINGS["ENGINE_CONCURRENCY"]):
        problems.append(f"{found.unwitnessed} records have no counterpart in the engine")
    summed, rolled = watcher.totals()
    if summed != rolled:
        wrong_days = sorted(set(summed.items()) ^ set(rolled.items()))
        problems.append(f"the roll-up differs from the records: {wrong_days[:4]}")
    limited = _key_id(watcher, "quota")
    quota = {day: tokens for (day, key), (tokens, _) in rolled.items() if key == limited}
    if max(quota.values()) > plan.daily_tokens:
        problems.append(f"the key with {plan.daily_tokens} tokens a day had {quota}")
    if not callers.seen.codes["quota_exhausted"]:
        problems.append(f"no day's quota ever ended: {quota}")
    if len(quota) < max(2, int(plan.seconds / plan.day_seconds) - 1):
        problems.append(f"the next day did not open the key again: {quota}")
    outcomes: dict[str, int] = {}
    for row in watcher.rows.values():
        outcomes[row.outcome] = outcomes.get(row.outcome, 0) + 1
    result["ledger"] = {
        "records": len(watcher.rows), "outcomes": outcomes, "days": len(watcher.days()),
        "seen to end": len(callers.seen.ended), "compared exactly": found.whole, "different": len(found.different),
        "unfinished": found.unfinished, "tokens of unfinished calls the gateway did not see": found.unfinished_behind,
        "without witness": found.unwitnessed, "quota": plan.daily_tokens, "days of the quota key": quota,
        "engine kills": deeds.engine_kills, "gateway kills": deeds.gateway_kills,
    }  # fmt: skip
    age = (running.wall.now() - watcher.oldest()) / DAY
    result["oldest record, days"] = round(age, 2)
    lived = (running.wall.now() - running.wall.began_wall) / DAY
    result["days lived"] = round(lived, 2)
    sweep = 3 * 60 * running.wall.factor / DAY  # the sweeper comes once a real minute
    if age > RETENTION_DAYS + sweep + HOLD_SECONDS / DAY:
        problems.append(f"a record is {age:.1f} days old, and {RETENTION_DAYS} are kept")


def _key_id(watcher: Watcher, name: str) -> str:
    return next(str(key) for key, known in watcher.query("SELECT id, name FROM keys") if known == name)


def steady(plan: Plan, samples: list[Sample]) -> list[Sample]:
    """The samples of the gateway's last life after its warm-up."""
    whole = [s for s in samples if s["life"] == samples[-1]["life"]] if samples else []
    return [s for s in whole if s["at"] > whole[0]["at"] + plan.warm_seconds]


def judge_growth(result: dict[str, Any], plan: Plan, samples: list[Sample]) -> None:
    """The gateway's last life after its warm-up: what is flat, what is bounded."""
    problems, calm = result["problems"], steady(plan, samples)
    if len(calm) < LEAST_SAMPLES:
        problems.append(f"only {len(calm)} samples of the gateway's last life")
        return
    third = len(calm) // 3
    minutes = (calm[-1]["at"] - calm[0]["at"]) / 60
    growth: dict[str, Any] = {"minutes": round(minutes, 1), "samples": len(samples)}
    for name in ("rss", "descriptors", "threads", "series", "database", "log", "nginx_rss", "nginx_descriptors"):
        values = [float(s[name]) for s in calm]  # type: ignore[literal-required]
        growth[name] = {
            "first": statistics.median(values[:third]),
            "last": statistics.median(values[-third:]),
            "most": max(values),
            "per hour": round(slope([(s["at"], float(s[name])) for s in calm]) * 3600, 1),  # type: ignore[literal-required]
        }
    growth["cpu"] = round((calm[-1]["cpu"] - calm[0]["cpu"]) / (calm[-1]["at"] - calm[0]["at"]), 4)
    result["growth"] = growth
    result["curve"] = [
        [round(s["at"]), s["life"], s["rss"], s["descriptors"], s["threads"], s["series"], s["database"]]
        for s in samples[:: max(1, len(samples) // 240)]
    ]
    result["bounds"] = bounds(plan)
    problems += [f"{name} grew: {told}" for name, told in verdicts(growth, result["bounds"]) if told]


def bounds(plan: Plan) -> dict[str, float]:
    """What growth is allowed; a short run's line is too noisy for a rate, so its rise is bounded instead."""
    hours = plan.seconds >= 1500
    return {
        "rss per hour, MB": 5 if hours else 0,
        "rss rise, MB": 5 if hours else 6,
        "descriptors": 6 if hours else 20,  # in a minute what happens to be open just then counts for more
        "threads": 2,
        "series": 1500,
        "series per hour": 20 if hours else 0,
        "nginx rss rise, MB": 5,
        "database, most by last third": 1.2 if hours else 0,
    }


def verdicts(growth: dict[str, Any], allowed: dict[str, float]) -> list[tuple[str, str]]:
    """Name → what is wrong, empty when it holds."""

    def rise(name: str) -> float:
        return float(growth[name]["last"] - growth[name]["first"])

    checks: list[tuple[str, float, float]] = [
        ("resident memory, MB", rise("rss") / MEGABYTE, allowed["rss rise, MB"]),
        ("descriptors", rise("descriptors"), allowed["descriptors"]),
        ("threads", rise("threads"), allowed["threads"]),
        ("series", growth["series"]["most"], allowed["series"]),
        ("nginx's memory, MB", rise("nginx_rss") / MEGABYTE, allowed["nginx rss rise, MB"]),
    ]
    if allowed["rss per hour, MB"]:
        checks.append(
            ("resident memory, MB an hour", growth["rss"]["per hour"] / MEGABYTE, allowed["rss per hour, MB"])
        )
        checks.append(("series an hour", growth["series"]["per hour"], allowed["series per hour"]))
        database = growth["database"]["last"] / growth["database"]["first"]
        checks.append(("the database, last third by first", database, allowed["database, most by last third"]))
    return [(name, f"{value:.2f} > {most}" if value > most else "") for name, value, most in checks]


def judge_logs(result: dict[str, Any], running: Site) -> None:
    """No secret and no prompt in any log, and not a line that is no JSON in the gateway's."""
    for path in running.logs:
        if path.exists():
            with path.open("rb") as lines:
                found = running.leaks(lines)
            if found:
                result["problems"].append(f"{path.name}: {found[:3]}")
    result["log bytes"] = sum(path.stat().st_size for path in running.logs if path.exists())


def run(folder: Path, plan: Plan, database: str | None = None) -> dict[str, Any]:
    """`soak`, to its end."""
    return asyncio.run(soak(folder, plan, database))
