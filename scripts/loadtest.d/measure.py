"""From the generator's records (one JSON object a call) to the numbers of a report."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUANTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Sample:
    """One call. Times in seconds; `start` since the first call. `error` is empty for a good answer."""

    start: float
    duration: float
    first_token: float | None
    inter_token: float | None
    prompt_tokens: int
    completion_tokens: int
    error: str


@dataclass(frozen=True)
class Result:
    """One run. `seconds` from the first call's start to the last one's end."""

    samples: list[Sample]
    seconds: float
    levels: dict[str, float]  # service level: first_token and inter_token in seconds
    summary: dict[str, Any] = field(default_factory=dict)


def read(path: Path, levels: dict[str, float]) -> Result:
    """Read the generator's records. Raises SystemExit with one line when there are none."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
    if not records:
        raise SystemExit("loadtest: the generator recorded no call; its log is beside the report")
    began = min(record["metadata"]["request_start_ns"] for record in records)
    ended = max(record["metadata"]["request_end_ns"] for record in records)
    samples = sorted((_sample(record, began) for record in records), key=lambda sample: sample.start)
    seconds = max((ended - began) / 1e9, 1e-9)
    return Result(samples, seconds, levels, _summary(samples, seconds, levels))


def _sample(record: dict[str, Any], began: int) -> Sample:
    meta, metrics = record["metadata"], record.get("metrics", {})

    def value(name: str) -> float | None:
        found = metrics.get(name, {}).get("value")
        return float(found) if isinstance(found, (int, float)) else None

    def milliseconds(name: str) -> float | None:
        found = value(name)
        return None if found is None else found / 1000

    error = record.get("error") or {}
    reason = ""
    if error:
        reason = f"{error.get('code') or ''} {error.get('type') or 'error'}".strip()
    elif meta.get("was_cancelled"):
        reason = "cut off at the end of the run"
    return Sample(
        start=(meta["request_start_ns"] - began) / 1e9,
        duration=(meta["request_end_ns"] - meta["request_start_ns"]) / 1e9,
        first_token=milliseconds("time_to_first_token"),
        inter_token=milliseconds("inter_token_latency"),
        prompt_tokens=int(value("usage_prompt_tokens") or 0),
        completion_tokens=int(value("usage_completion_tokens") or 0),
        error=reason,
    )


def quantile(values: list[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed (nearest rank); NaN when there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def kept(sample: Sample, levels: dict[str, float]) -> bool:
    """Whether the call was answered within the service level."""
    if sample.error or sample.first_token is None or sample.first_token > levels["first_token"]:
        return False
    return sample.inter_token is None or sample.inter_token <= levels["inter_token"]


def _summary(samples: list[Sample], seconds: float, levels: dict[str, float]) -> dict[str, Any]:
    good = [sample for sample in samples if not sample.error]
    within = sum(kept(sample, levels) for sample in samples)
    times = {
        "first_token": [sample.first_token for sample in good if sample.first_token is not None],
        "inter_token": [sample.inter_token for sample in good if sample.inter_token is not None],
        "duration": [sample.duration for sample in good],
    }
    return {
        "calls": len(samples),
        "errors": len(samples) - len(good),
        "error_kinds": dict(Counter(sample.error for sample in samples if sample.error).most_common()),
        "seconds": seconds,
        "calls_per_second": len(good) / seconds,
        "goodput_calls_per_second": within / seconds,
        "goodput_share": within / len(samples),
        "prompt_tokens_per_second": sum(sample.prompt_tokens for sample in good) / seconds,
        "completion_tokens_per_second": sum(sample.completion_tokens for sample in good) / seconds,
        **{
            f"{name}_p{percent}_seconds": quantile(values, percent)
            for name, values in times.items()
            for percent in QUANTILES
        },
    }


def running(samples: list[Sample], seconds: float, steps: int = 60) -> list[tuple[float, float]]:
    """(second, calls in flight) over the run."""
    width = seconds / steps
    times = [width * (step + 0.5) for step in range(steps)]
    return [(time, sum(s.start <= time < s.start + s.duration for s in samples)) for time in times]


def rate(samples: list[Sample], seconds: float, steps: int = 30) -> list[tuple[float, float]]:
    """(second, completion tokens a second) over the run; a call's tokens are spread over its answer."""
    width = seconds / steps
    found = [0.0] * steps
    for sample in samples:
        if sample.error or not sample.completion_tokens:
            continue
        begin = sample.start + (sample.first_token or 0.0)
        end = max(sample.start + sample.duration, begin + 1e-6)
        for step in range(steps):
            shared = min(end, (step + 1) * width) - max(begin, step * width)
            if shared > 0:
                found[step] += sample.completion_tokens * shared / (end - begin)
    return [(width * (step + 0.5), tokens / width) for step, tokens in enumerate(found)]
