"""Records the answers of the NVML that is loaded, in the form that the double replays.

The double and the recorder prove each other: a recording of the double is what the double was told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml

from gpu_exporter import calls

ANONYMOUS = {"UUID": "GPU-00000000-0000-4000-8000-0000000000{index:02x}", "Serial": "recorded"}
TEXTS = ("Name", "UUID", "Serial", "VbiosVersion")


def record(folder: Path) -> list[Path]:
    """Write a file for each kind of GPU; the files written. Raises pynvml.NVMLError when the driver does not open."""
    pynvml.nvmlInit()
    written: dict[str, Path] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(handle)
        path = folder / (re.sub(r"\W+", "-", name).strip("-").lower() + ".txt")
        if name not in written:
            note = f"# {name}, recorded with driver {pynvml.nvmlSystemGetDriverVersion()}\n"
            path.write_text(note + "".join(f"{key} {value}\n" for key, value in _answers(handle, index)))
            written[name] = path
    return list(written.values())


def _answers(handle: Any, index: int) -> Iterator[tuple[str, str]]:
    for text in TEXTS:
        answer = _asked(f"nvmlDeviceGet{text}", handle)
        if answer:
            yield text, ANONYMOUS[text].format(index=index) if text in ANONYMOUS and answer[0] != "!" else answer
    plain = ["Architecture", "MinorNumber", "NumFans", "MaxMigDeviceCount", "CudaComputeCapability", "MigMode"]
    plain += ["CurrentClocksEventReasons", "SupportedClocksEventReasons"]
    yield from _known((call, _asked(f"nvmlDeviceGet{call}", handle)) for call in plain)
    yield from _known([("PciInfo", _asked("nvmlDeviceGetPciInfo_v3", handle, pick=lambda info: info.busId))])
    members = ("total", "reserved", "free", "used")
    memory = _asked(
        "nvmlDeviceGetMemoryInfo",
        handle,
        pynvml.nvmlMemory_v2,
        pick=lambda info: " ".join(str(getattr(info, member)) for member in members),
    )
    yield from _known([("MemoryInfo_v2", memory)])
    for call, arguments, *_ in calls.NUMBERS:
        key = call.removeprefix("nvmlDeviceGet").replace("TemperatureV", "Temperature")
        yield from _known([(".".join([key, *map(str, arguments)]), _asked(call, handle, *arguments))])
    for call, arguments, group in calls.GROUPS:
        key = ".".join([call.removeprefix("nvmlDeviceGet"), *map(str, arguments)])
        yield from _known([(key, _asked(call, handle, *arguments, pick=_group([row[0] for row in group])))])
    fans = _asked("nvmlDeviceGetNumFans", handle)
    for fan in range(int(fans) if fans.isdigit() else 0):
        yield from _known([(f"FanSpeed_v2.{fan}", _asked("nvmlDeviceGetFanSpeed_v2", handle, fan))])
    links = 0
    for name, *_ in calls.FIELDS:
        answer = _field(handle, name, 0)
        yield from _known([(f"Field.{_field_id(name)}.0", answer)])
        if name == "NVLINK_LINK_COUNT" and answer.isdigit():
            links = int(answer)
    for link in range(links):
        for name, *_ in calls.LINK_FIELDS:
            yield from _known([(f"Field.{_field_id(name)}.{link}", _field(handle, name, link))])
    yield from _performance(handle)


def _performance(handle: Any) -> Iterator[tuple[str, str]]:
    support = _asked("nvmlGpmQueryDeviceSupport", handle, pick=lambda answer: str(answer.isSupportedDevice))
    if support != "1":
        return
    yield "GpmSupport", "1"
    samples = [pynvml.nvmlGpmSampleGet(handle, pynvml.nvmlGpmSampleAlloc()) for _ in range(2)]
    request = pynvml.c_nvmlGpmMetricsGet_t(version=pynvml.NVML_GPM_METRICS_GET_VERSION)
    request.numMetrics, (request.sample1, request.sample2) = len(calls.PERFORMANCE), samples
    ids = [getattr(pynvml, f"NVML_GPM_METRIC_{name}") for name, *_ in calls.PERFORMANCE]
    for slot, metric in enumerate(ids):
        request.metrics[slot].metricId = metric
    try:
        pynvml.nvmlGpmMetricsGet(request)
    except pynvml.NVMLError:
        return  # the two samples were too close together for this driver
    for slot, metric in enumerate(ids):
        if request.metrics[slot].nvmlReturn == 0:
            yield f"Gpm.{metric}", repr(request.metrics[slot].value)


def _asked(call: str, *arguments: Any, pick: Callable[[Any], str] | None = None) -> str:
    """The answer as the double's text: `!code` for an error, nothing for what is not supported."""
    try:
        answer = getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError as error:
        unsupported = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return "" if error.value in unsupported else f"!{error.value}"
    if pick:
        return pick(answer)
    return " ".join(map(str, answer)) if isinstance(answer, list | tuple) else str(answer)


def _group(members: list[str | int]) -> Callable[[Any], str]:
    """How the double writes a structure: all members of a list, the named ones of a structure."""

    def text(answer: Any) -> str:
        values = answer if isinstance(answer, list | tuple) else [getattr(answer, str(name)) for name in members]
        if hasattr(answer, "bar1Total"):
            values = [answer.bar1Total, answer.bar1Free, answer.bar1Used]
        return " ".join(map(str, values))

    return text


def _field_id(name: str) -> int:
    number: int = getattr(pynvml, f"NVML_FI_DEV_{name}")
    return number


def _field(handle: Any, name: str, scope: int) -> str:
    (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(_field_id(name), scope)])
    if value.nvmlReturn:
        return "" if value.nvmlReturn == pynvml.NVML_ERROR_NOT_SUPPORTED else f"!{value.nvmlReturn}"
    members = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
    return str(getattr(value.value, members[value.valueType]))


def _known(pairs: Any) -> Iterator[tuple[str, str]]:
    return ((key, answer) for key, answer in pairs if answer)
