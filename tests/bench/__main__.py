"""Side by side with other gateways: `make bench`, or `python -m tests.bench [--rounds N] [--only ours,nginx] …`.

One gateway at a time is loaded, in turns that change their order from round to round; the others wait, started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench import edge, engine, gateways, load, machine, report
from tests.bench.machine import GATEWAY_CORE, LOAD_CORE, Process

ONCE = os.environ.get("BENCH_ONCE", "litellm").split(",")  # so slow that one round says it all


def start(name: str, upstream: int, folder: Path) -> tuple[load.Target, dict[str, float]]:
    """Start one gateway; the target, how long it took, and its memory at rest."""
    gateway = gateways.ALL[name]
    port = machine.free_port()
    inside = folder / name
    inside.mkdir()
    argv, environment = gateway.start(port, upstream, inside)
    process = Process(name, argv, GATEWAY_CORE, inside, environment)
    try:
        machine.wait_for(
            f"{name} answers (log: {process.log})",
            lambda: process.popen.poll() is not None or machine.answers(f"http://127.0.0.1:{port}{gateway.health}"),
            120,
        )
    except TimeoutError:
        process.stop()
        raise
    if process.popen.poll() is not None:
        raise RuntimeError(f"{name} ended at its start:\n{process.log.read_text()[-2000:]}")
    at_start = {"start_seconds": time.monotonic() - process.started, "rest_mb": process.rss_mb()}
    return load.Target(name, port, process, gateway.exact), at_start


def run(names: list[str], rounds: int, seconds: float, connections: tuple[int, ...], folder: Path) -> dict[str, Any]:
    """Start all, measure in turns, stop all."""
    double = Process("double", [str(machine.build("double")), "0"], LOAD_CORE, folder)
    targets: list[load.Target] = []
    behind: Process | None = None
    result: dict[str, Any] = {"machine": machine.describe(gateways.PYTHON), "rounds": [], "start": {}, "idle": {}, "left_out": {},
                              "edge": []}  # fmt: skip
    try:
        machine.wait_for("the double listens", lambda: double.log.read_text().strip().isdigit(), 10)
        upstream = int(double.log.read_text())
        targets.append(load.Target("direct", upstream, double))
        for name in names:
            if (reason := gateways.ALL[name].missing()) is not None:
                result["left_out"][name] = reason
                print(f"bench: without {name}: {reason}", flush=True)
                continue
            target, result["start"][name] = start(name, upstream, folder)
            targets.append(target)
            load.calls(target, double, 16, 1)  # warm
        ours = next((target for target in targets if target.name == "ours"), None)
        if ours is not None and edge.NGINX is not None:
            behind, https = edge.start(ours.port, folder)
        for number in range(rounds):
            order = list(targets)
            random.Random(number).shuffle(order)
            taken: dict[str, Any] = {}
            for target in order:
                if number and target.name in ONCE:
                    continue
                taken[target.name] = load.measure(target, double, connections, seconds)
                print(report.line(number, target.name, taken[target.name]), flush=True)
            if ours is not None and behind is not None:
                result["edge"].append(edge.measure(ours, double, behind, https, connections, seconds))
            result["rounds"].append(taken)
            (machine.STATE / "results.json").write_text(json.dumps(result, indent=1))  # what there is, if it is stopped
        for target in targets[1:]:
            try:
                result["idle"][target.name] = load.idle_memory(target)
            except TimeoutError as error:
                result["idle"][target.name] = {"failed": str(error)}
    finally:
        if behind is not None:
            behind.stop()
        for target in targets[1:]:
            target.process.stop()
        double.stop()
    return result


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_ROUNDS", "5")))
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("BENCH_SECONDS", "3")))
    parser.add_argument("--only", default=os.environ.get("BENCH_ONLY", ",".join(gateways.ALL)))
    parser.add_argument("--connections", default="1,16,64,256")
    parser.add_argument("--keep", action="store_true", help="keep the gateways' folders (logs, databases)")
    parser.add_argument("--again", action="store_true", help="write the documents from the last run's figures")
    parser.add_argument("--engine", action="store_true", help="only at the saturation of the real engine (minutes)")
    parser.add_argument("--no-docs", action="store_true", help="print only, leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    if options.engine or os.environ.get("BENCH_ENGINE"):
        engine.main(None if options.no_docs else machine.ROOT / "docs")
        return
    if options.again:
        report.write(json.loads((machine.STATE / "results.json").read_text()), machine.ROOT / "docs")
        return
    for tool in ("wrk", "taskset", "cc"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is missing (Debian: apt-get install wrk util-linux gcc)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also then nothing may be left running
    machine.STATE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=machine.STATE))
    folder.chmod(0o755)
    names = [name for name in options.only.split(",") if name]
    connections = tuple(int(count) for count in options.connections.split(","))
    result = run(names, options.rounds, options.seconds, connections, folder)
    (machine.STATE / "results.json").write_text(json.dumps(result, indent=1))
    print(report.table(result))
    if not options.no_docs:
        report.write(result, machine.ROOT / "docs")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
