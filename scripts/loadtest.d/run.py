"""Run the generator against the appliance and write the report. Started by scripts/loadtest, in its environment."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import measure
import report

HOME = Path(__file__).resolve().parent
ROOT = HOME.parents[1]
STATE = Path(os.environ.get("APPLIANCE_STATE", ".state")).resolve()


def fail(message: str) -> SystemExit:
    """A line for the operator and exit status 2."""
    print(f"loadtest: {message}", file=sys.stderr)
    return SystemExit(2)


def positive(name: str, default: str) -> float:
    """A number above zero from the environment."""
    text = os.environ.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise fail(f"{name} must be a number above zero, not {text!r}")
    return value


def appliance() -> tuple[str, Path | None]:
    """URL and certificate of the appliance that this checkout and its `.env` name, in whichever form it runs."""
    argv = [str(ROOT / ".venv/bin/python"), "-m", "scripts.local", "where", "edge"]
    told = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    if told.returncode != 0:
        reason = (told.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("where: ")
        raise fail(f"{reason} (make status)")
    url, certificate = told.stdout.splitlines()
    return url, Path(certificate) if certificate else None


def get(url: str, key: str, certificate: Path | None) -> bytes:
    """What a route answers."""
    context = ssl.create_default_context(cafile=str(certificate) if certificate else None)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=10, context=context if url.startswith("https") else None) as answer:
        return bytes(answer.read())


def own_key(url: str, certificate: Path | None) -> str:
    """A key made for this run in the appliance that runs here; it ends an hour after the run."""
    try:
        get(f"{url}/health", "", certificate)
    except OSError as error:
        raise fail(
            f"{url} does not answer ({getattr(error, 'reason', error)}): is the appliance up? (make status)"
        ) from None
    now = datetime.now(UTC)
    ends = now + timedelta(seconds=positive("DURATION", "60") + 3600)
    name = now.strftime("loadtest-%Y%m%d-%H%M%S")
    argv = ["scripts/keys", "create", "--name", name, "--expires-at", ends.isoformat(timespec="seconds"), "--json"]
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        return str(json.loads(made.stdout)["secret"])
    except (ValueError, KeyError):
        raise fail("API_KEY is not set, and no key could be made: is the appliance up? (make status)") from None


def target() -> tuple[str, str, Path | None]:
    """URL, key and certificate: given, or those of this machine's appliance."""
    key = os.environ.get("API_KEY") or os.environ.get("KEY") or ""
    if not key and os.environ.get("URL"):
        raise fail("API_KEY is not set: give a key of the gateway at URL")
    given = os.environ.get("CA_FILE")
    if given and not Path(given).is_file():
        raise fail(f"CA_FILE names {given}, which is not a file")
    if url := os.environ.get("URL", "").rstrip("/"):
        own = (STATE / "edge-certificates/fullchain.pem", STATE / "certificate.pem")  # another name of this machine
        certificate = next((path for path in own if path.is_file()), None)
    else:
        url, certificate = appliance()
    certificate = Path(given) if given else certificate
    return url, key or own_key(url, certificate), certificate


def models(url: str, key: str, certificate: Path | None) -> list[str]:
    """What the appliance serves; also proves that it answers and takes the key."""
    try:
        return [model["id"] for model in json.loads(get(f"{url}/v1/models", key, certificate))["data"]]
    except urllib.error.HTTPError as error:
        raise fail(f"{url}/v1/models answers {error.code}: is API_KEY right?") from None
    except (OSError, ValueError, KeyError) as error:
        raise fail(
            f"{url} does not answer ({getattr(error, 'reason', error)}): is the appliance up? (make status)"
        ) from None


def command(folder: Path, url: str, kind: dict[str, Any], levels: dict[str, float]) -> list[str]:
    """The generator's command line, without the key: everybody on the machine can read it."""
    seconds = positive("DURATION", "60")
    load = (
        ["--concurrency", str(kind["concurrency"])]
        if kind["rate"] is None
        else ["--request-rate", str(kind["rate"]), "--arrival-pattern", "poisson"]
    )
    goodput = (
        f"time_to_first_token:{levels['first_token'] * 1000:g} inter_token_latency:{levels['inter_token'] * 1000:g}"
    )
    return [
        *(sys.executable, str(HOME / "generator.py"), "profile", "--url", url),
        *("--model", kind["model"], "--endpoint-type", "chat", "--streaming", "--use-legacy-max-tokens"),
        *("--use-server-token-count", "--tokenizer", str(STATE / "loadtest-venv/tokenizer")),
        *("--input-file", str(kind_prompts()), "--custom-dataset-type", "single_turn"),
        *("--dataset-sampling-strategy", "sequential", "--random-seed", "7"),
        *("--extra-inputs", f"max_tokens:{kind['max_tokens']}", "--extra-inputs", "temperature:0"),
        *load,
        *("--benchmark-duration", f"{seconds:g}", "--benchmark-grace-period", "30", "--goodput", goodput),
        *("--output-artifact-dir", str(folder / "generator"), "--export-level", "records"),
        *("--no-gpu-telemetry", "--no-server-metrics", "--ui", "simple"),
    ]


def kind_prompts() -> Path:
    """The prompts: the project's own unless PROMPTS says otherwise."""
    path = Path(os.environ.get("PROMPTS") or HOME / "prompts.jsonl").resolve()
    if not path.is_file():
        raise fail(f"PROMPTS names {path}, which is not a file")
    return path


def main() -> int:
    """Run; 0 when calls were answered, 1 when none was, 2 when it could not begin."""
    url, key, certificate = target()
    served = models(url, key, certificate)
    model = os.environ.get("MODEL") or (served[0] if served else "")
    if model not in served:
        raise fail(f"MODEL {model!r} is not served (there are: {', '.join(served) or 'none'})")
    rate = positive("RATE", "1") if os.environ.get("RATE") else None
    kind = {
        "model": model,
        "concurrency": int(positive("CONCURRENCY", "8")) if rate is None else None,
        "rate": rate,
        "max_tokens": int(positive("MAX_TOKENS", "128")),
        "prompts": hashlib.sha256(kind_prompts().read_bytes()).hexdigest()[:12],
    }
    levels = {"first_token": positive("TTFT_MS", "2500") / 1000, "inter_token": positive("ITL_MS", "100") / 1000}
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    results = Path(os.environ.get("LOADTEST_DIR") or STATE / "loadtest").resolve()
    folder = results / when
    folder.mkdir(parents=True)
    environment = {**os.environ, "LOADTEST_KEY": key, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
    if certificate is not None:
        environment["SSL_CERT_FILE"] = str(certificate)
    print(f"loadtest: {model} at {url}; the report will be {folder}/report.html", flush=True)
    with (folder / "generator.log").open("wb") as log:
        # Progress goes to the terminal (stderr); the generator's tables to its log: the report says it shorter.
        done = subprocess.run(command(folder, url, kind, levels), env=environment, stdout=log, check=False)
    (folder / "generator/inputs.json").unlink(missing_ok=True)
    result = measure.read(folder / "generator/profile_export.jsonl", levels)
    run = {"when": when, "url": url, "kind": kind, "levels": levels, "summary": result.summary}
    earlier = report.comparable(results / "results.jsonl", run)
    (folder / "report.html").write_text(report.page(run, result, earlier))
    (folder / "summary.json").write_text(json.dumps(run, indent=1) + "\n")
    with (results / "results.jsonl").open("a") as history:
        history.write(json.dumps(run) + "\n")
    print("\n".join(report.lines(result.summary)))
    print(f"loadtest: {folder}/report.html")
    return 0 if done.returncode == 0 and result.summary["errors"] < result.summary["calls"] else 1


if __name__ == "__main__":
    sys.exit(main())
