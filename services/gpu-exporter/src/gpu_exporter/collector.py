"""From a sample to metric families: GPU data by the tables of names, and the exporter's own health beside it."""

# ruff: noqa: E501  # tables: a row is a line

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gpu_exporter import __version__
from gpu_exporter.dcgm import FIELDS, MIG_FIELDS, XID, XID_SECONDS
from gpu_exporter.exposition import Series, labels, render
from gpu_exporter.native import FAMILIES, MIG_FAMILIES, Family
from gpu_exporter.readings import Gpu, MigInstance, Readings, Sample

STATES = (
    "starting",
    "ok",
    "no_driver",
    "no_gpu",
    "driver_mismatch",
    "access_lost",
    "no_permission",
    "hung",
    "failed",
)


@dataclass(frozen=True, slots=True)
class Health:
    """What is true of the exporter whatever the driver does. Times are Unix seconds, durations seconds."""

    state: str = "starting"
    success: bool = False
    finished_at: float = 0.0
    succeeded_at: float = 0.0
    hung_at: float = 0.0
    duration: float = 0.0
    calls: int = 0
    visible: int = 0
    expected: int = 0
    collects: int = 0
    failed_collects: int = 0
    replacements: int = 0
    stuck: int = 0
    demo: bool = False
    # By (call, error); GPUs ever seen as uuid: (index, "" or why it gives no data); XIDs as (uuid, index, xid).
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    gpus: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    xids: Mapping[tuple[str, int, str], tuple[int, float]] = field(default_factory=dict)
    # GPUs of the last sample that were never readable, so that nobody knows their uuid, as index: why.
    unnamed: Mapping[int, str] = field(default_factory=dict)
    # By uuid, DCGM's labels of the GPU, which its XIDs need also when there is no sample.
    dcgm_labels: Mapping[str, str] = field(default_factory=dict)


def render_data(sample: Sample, names: str, hostname: str) -> str:
    """The part of the page that one sample gives, in the names that are wanted."""
    families: list[Series] = []
    readable = [gpu for gpu in sample.gpus if not gpu.unreadable]
    if names != "dcgm":
        families += _native(sample, readable)
    if names != "native":
        families += _dcgm(sample, readable, hostname)
    return render(families)


def render_health(health: Health, names: str, now: float) -> str:
    """The part of the page that is true also when there is no data."""
    gpus = [*((uuid, *gpu) for uuid, gpu in health.gpus.items()), *(("", *gpu) for gpu in health.unnamed.items())]
    base = [
        Series(
            "gpu_exporter_info",
            "gauge",
            "The exporter; source is `driver` or `demo`.",
            [(labels([("version", __version__), ("source", "demo" if health.demo else "driver")]), 1)],
        ),
        _one("gpu_exporter_last_collect_success", "gauge", "1 when the last sample succeeded.", float(health.success)),
        _one("gpu_exporter_last_collect_timestamp_seconds", "gauge", "When a sample last succeeded; 0 is never.", health.succeeded_at),
        _one("gpu_exporter_last_hang_timestamp_seconds", "gauge", "When a call into the driver last hung; 0 is never.", health.hung_at),
        _one("gpu_exporter_last_collect_duration_seconds", "gauge", "How long the last sample took.", health.duration),
        _one("gpu_exporter_last_collect_calls", "gauge", "Calls into the driver that the last good sample made.", health.calls),
        _one("gpu_exporter_collects_total", "counter", "Samples tried.", health.collects),
        _one("gpu_exporter_failed_collects_total", "counter", "Samples that failed.", health.failed_collects),
        _one("gpu_exporter_probe_replacements_total", "counter", "Times the process that talks to the driver was replaced.", health.replacements),
        _one("gpu_exporter_stuck_probes", "gauge", "Such processes that the driver holds and that cannot be ended.", health.stuck),
        Series(
            "gpu_exporter_state",
            "gauge",
            "1 for the state the exporter is in.",
            [(labels([("state", state)]), float(state == health.state)) for state in STATES],
        ),
        Series(
            "gpu_exporter_call_failures_total",
            "counter",
            "Calls into the driver that failed, hung, or ended the probe.",
            [(labels([("call", call), ("error", error)]), count) for (call, error), count in sorted(health.failures.items())],
        ),
        _one("gpu_visible", "gauge", "GPUs that gave data in the last sample.", health.visible),
        _one("gpu_expected", "gauge", "GPUs that should: GPU_EXPECTED, or as many as were seen since the start.", health.expected),
        Series(
            "gpu_up",
            "gauge",
            "1 when the GPU gave data in the last sample; a GPU once seen stays in this family.",
            [(_gpu_labels(uuid, index), float(not why)) for uuid, index, why in gpus],
        ),
        Series(
            "gpu_unreadable",
            "gauge",
            "1 for a GPU that gives no data, by reason: lost, hung, gone, reset_required, failing, no_sample.",
            [(_gpu_labels(uuid, index, ("reason", why)), 1) for uuid, index, why in gpus if why],
        ),
        Series(
            "gpu_xid_errors_total",
            "counter",
            "XID events since the exporter started.",
            [(_gpu_labels(uuid, index, ("xid", xid)), count) for (uuid, index, xid), (count, _) in health.xids.items()],
        ),
        Series(
            "gpu_xid_last_timestamp_seconds",
            "gauge",
            "When the XID was last seen.",
            [(_gpu_labels(uuid, index, ("xid", xid)), at) for (uuid, index, xid), (_, at) in health.xids.items()],
        ),
    ]  # fmt: skip
    if names != "native":
        base.append(_dcgm_xid(health, now))
    return render(base)


def _native(sample: Sample, gpus: list[Gpu]) -> Iterable[Series]:
    driver = sample.driver
    versions = [
        ("driver_version", driver.version),
        ("cuda_version", driver.cuda_version),
        ("nvml_version", driver.nvml_version),
    ]
    yield Series("gpu_driver_info", "gauge", "Versions of the driver.", [(labels(versions), 1)])
    yield Series(
        "gpu_info",
        "gauge",
        "Who the GPU is; join on uuid.",
        [
            (
                labels(
                    [
                        ("uuid", gpu.identity.uuid),
                        ("gpu", str(gpu.identity.index)),
                        ("name", gpu.identity.name),
                        ("pci_bus_id", gpu.identity.pci_bus_id),
                        ("serial", gpu.identity.serial),
                        ("vbios_version", gpu.identity.vbios_version),
                        ("architecture", gpu.identity.architecture),
                        ("compute_capability", gpu.identity.compute_capability),
                        *versions[:2],
                    ]
                ),
                1,
            )
            for gpu in gpus
        ],
    )
    owners = [(_gpu_labels(gpu.identity.uuid, gpu.identity.index), gpu.readings) for gpu in gpus]
    yield from (_family(family, owners) for family in FAMILIES)
    parts = [(gpu, mig) for gpu in gpus for mig in gpu.mig]
    yield Series(
        "gpu_mig_info",
        "gauge",
        "A MIG device; join on uuid, gpu_instance and compute_instance.",
        [
            (f"{_mig_labels(gpu, mig)},{labels([('mig_uuid', mig.uuid), ('profile', mig.profile)])}", 1)
            for gpu, mig in parts
        ],
    )
    shares = [(_mig_labels(gpu, mig), mig.readings) for gpu, mig in parts]
    yield from (_family(family, shares) for family in MIG_FAMILIES)


def _family(family: Family, owners: list[tuple[str, Readings]]) -> Series:
    rows = []
    for owner, readings in owners:
        for value, extra in readings.get(family.quantity, ()):
            text = f"{owner},{labels(zip(family.labels, extra, strict=True))}" if extra else owner
            rows.append((text, value))
    return Series(family.name, family.kind, family.help, rows)


def _dcgm(sample: Sample, gpus: list[Gpu], hostname: str) -> Iterable[Series]:
    owners = [(dcgm_labels(gpu, sample, hostname), gpu.readings) for gpu in gpus]
    shares = [
        (
            dcgm_labels(gpu, sample, hostname, (("GPU_I_PROFILE", mig.gpu_profile), ("GPU_I_ID", mig.gpu_instance))),
            mig.readings,
        )
        for gpu in gpus
        for mig in _gpu_instances(gpu)
    ]
    for item in FIELDS:
        rows = [
            (owner, value * item.factor)
            for owner, readings in owners + (shares if item.name in MIG_FIELDS else [])
            for value, extra in readings.get(item.quantity, ())
            if tuple(extra) == item.labels
        ]
        yield Series(item.name, item.kind, item.help, rows)


def _gpu_instances(gpu: Gpu) -> Iterable[MigInstance]:
    """One MIG device for each GPU instance: DCGM's labels do not tell those apart that share one."""
    first: dict[str, MigInstance] = {}
    for mig in gpu.mig:
        first.setdefault(mig.gpu_instance, mig)
    return first.values()


def dcgm_labels(gpu: Gpu, sample: Sample, hostname: str, extra: Iterable[tuple[str, str]] = ()) -> str:
    """DCGM's labels of a GPU, or with `extra` of a MIG device."""
    identity = gpu.identity
    minor = identity.index if identity.minor_number is None else identity.minor_number
    return labels(
        [
            ("gpu", str(identity.index)),
            ("UUID", identity.uuid),
            ("pci_bus_id", identity.pci_bus_id),
            ("device", f"nvidia{minor}"),
            ("modelName", identity.name),
            *extra,
            ("Hostname", hostname),
            ("DCGM_FI_DRIVER_VERSION", sample.driver.version),
        ]
    )


def _dcgm_xid(health: Health, now: float) -> Series:
    rows = []
    for uuid, (index, _) in health.gpus.items():
        recent = [
            (at, xid) for (owner, _, xid), (_, at) in health.xids.items() if owner == uuid and now - at < XID_SECONDS
        ]
        last = max(recent, default=(0.0, "0"))[1]
        known = health.dcgm_labels.get(uuid) or labels([("gpu", str(index)), ("UUID", uuid)])  # never readable yet
        rows.append((known, float(last) if last.isdigit() else 0.0))
    return Series(XID.name, XID.kind, XID.help, rows)


def _one(name: str, kind: str, text: str, value: float) -> Series:
    return Series(name, kind, text, [("", value)])


def _gpu_labels(uuid: str, index: int, *extra: tuple[str, str]) -> str:
    return labels([("uuid", uuid), ("gpu", str(index)), *extra])


def _mig_labels(gpu: Gpu, mig: MigInstance) -> str:
    identity = gpu.identity
    instances = [("gpu_instance", mig.gpu_instance), ("compute_instance", mig.compute_instance)]
    return labels([("uuid", identity.uuid), ("gpu", str(identity.index)), *instances])
