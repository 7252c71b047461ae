"""The driver calls that make a sample, as data. Names are NVML's; `nvml.py` makes the calls.

Quantities are in base units: ratios 0…1, bytes, watts, joules, hertz, seconds, degrees Celsius.
Sources: NVML's API reference and the comments in `pynvml`.
"""

from __future__ import annotations

KIB, MIB = 1024.0, 1024.0 * 1024.0
MILLI, NANO, PERCENT, MEGA = 1e-3, 1e-9, 1e-2, 1e6
CELSIUS = ONE = 1.0

# One number: call, arguments, quantity, factor to the base unit, extra labels.
NUMBERS: tuple[tuple[str, tuple[int, ...], str, float, tuple[str, ...]], ...] = (
    ("nvmlDeviceGetTemperatureV", (0,), "temperature", CELSIUS, ()),
    ("nvmlDeviceGetMarginTemperature", (), "temperature_margin", CELSIUS, ()),
    ("nvmlDeviceGetTemperatureThreshold", (0,), "temperature_threshold", CELSIUS, ("shutdown",)),
    ("nvmlDeviceGetTemperatureThreshold", (1,), "temperature_threshold", CELSIUS, ("slowdown",)),
    ("nvmlDeviceGetTemperatureThreshold", (2,), "temperature_threshold", CELSIUS, ("memory_maximum",)),
    ("nvmlDeviceGetTemperatureThreshold", (3,), "temperature_threshold", CELSIUS, ("gpu_maximum",)),
    ("nvmlDeviceGetPowerUsage", (), "power", MILLI, ()),
    ("nvmlDeviceGetEnforcedPowerLimit", (), "power_limit", MILLI, ("enforced",)),
    ("nvmlDeviceGetPowerManagementDefaultLimit", (), "power_limit", MILLI, ("default",)),
    ("nvmlDeviceGetTotalEnergyConsumption", (), "energy", MILLI, ()),
    ("nvmlDeviceGetClockInfo", (0,), "clock", MEGA, ("graphics",)),
    ("nvmlDeviceGetClockInfo", (1,), "clock", MEGA, ("sm",)),
    ("nvmlDeviceGetClockInfo", (2,), "clock", MEGA, ("memory",)),
    ("nvmlDeviceGetClockInfo", (3,), "clock", MEGA, ("video",)),
    ("nvmlDeviceGetMaxClockInfo", (0,), "clock_maximum", MEGA, ("graphics",)),
    ("nvmlDeviceGetMaxClockInfo", (1,), "clock_maximum", MEGA, ("sm",)),
    ("nvmlDeviceGetMaxClockInfo", (2,), "clock_maximum", MEGA, ("memory",)),
    ("nvmlDeviceGetMaxClockInfo", (3,), "clock_maximum", MEGA, ("video",)),
    ("nvmlDeviceGetPerformanceState", (), "performance_state", ONE, ()),
    ("nvmlDeviceGetPersistenceMode", (), "persistence_mode", ONE, ()),
    ("nvmlDeviceGetComputeMode", (), "compute_mode", ONE, ()),
    ("nvmlDeviceGetTotalEccErrors", (0, 0), "ecc_errors", ONE, ("corrected", "volatile")),
    ("nvmlDeviceGetTotalEccErrors", (1, 0), "ecc_errors", ONE, ("uncorrected", "volatile")),
    ("nvmlDeviceGetTotalEccErrors", (0, 1), "ecc_errors", ONE, ("corrected", "aggregate")),
    ("nvmlDeviceGetTotalEccErrors", (1, 1), "ecc_errors", ONE, ("uncorrected", "aggregate")),
    ("nvmlDeviceGetRetiredPagesPendingStatus", (), "retired_pages_pending", ONE, ()),
    ("nvmlDeviceGetCurrPcieLinkGeneration", (), "pcie_generation", ONE, ()),
    ("nvmlDeviceGetMaxPcieLinkGeneration", (), "pcie_generation_maximum", ONE, ()),
    ("nvmlDeviceGetCurrPcieLinkWidth", (), "pcie_width", ONE, ()),
    ("nvmlDeviceGetMaxPcieLinkWidth", (), "pcie_width_maximum", ONE, ()),
    ("nvmlDeviceGetPcieReplayCounter", (), "pcie_replays", ONE, ()),
)

# Several numbers in one answer (a list, a tuple or a structure's fields): call, arguments, then for each member its
# name or position, quantity, factor and extra labels.
Member = tuple[str | int, str, float, tuple[str, ...]]
GROUPS: tuple[tuple[str, tuple[int, ...], tuple[Member, ...]], ...] = (
    (
        "nvmlDeviceGetUtilizationRates",
        (),
        (("gpu", "utilization", PERCENT, ()), ("memory", "memory_utilization", PERCENT, ())),
    ),
    ("nvmlDeviceGetEncoderUtilization", (), ((0, "encoder_utilization", PERCENT, ()),)),
    ("nvmlDeviceGetDecoderUtilization", (), ((0, "decoder_utilization", PERCENT, ()),)),
    ("nvmlDeviceGetJpgUtilization", (), ((0, "jpeg_utilization", PERCENT, ()),)),
    ("nvmlDeviceGetOfaUtilization", (), ((0, "ofa_utilization", PERCENT, ()),)),
    (
        "nvmlDeviceGetBAR1MemoryInfo",
        (),
        (
            ("bar1Total", "bar1_total", ONE, ()),
            ("bar1Used", "bar1_used", ONE, ()),
            ("bar1Free", "bar1_free", ONE, ()),
        ),
    ),
    (
        "nvmlDeviceGetPowerManagementLimitConstraints",
        (),
        ((0, "power_limit", MILLI, ("minimum",)), (1, "power_limit", MILLI, ("maximum",))),
    ),
    ("nvmlDeviceGetEccMode", (), ((0, "ecc_mode", ONE, ()), (1, "ecc_mode_pending", ONE, ()))),
    (
        "nvmlDeviceGetRemappedRows",
        (),
        (
            (0, "remapped_rows", ONE, ("correctable",)),
            (1, "remapped_rows", ONE, ("uncorrectable",)),
            (2, "row_remap_pending", ONE, ()),
            (3, "row_remap_failure", ONE, ()),
        ),
    ),
    (
        "nvmlDeviceGetRowRemapperHistogram",
        (),
        tuple((name, "row_remap_banks", ONE, (name,)) for name in ("max", "high", "partial", "low", "none")),
    ),
    *(
        ("nvmlDeviceGetViolationStatus", (policy,), (("violationTime", "violation", NANO, (name,)),))
        for policy, name in enumerate(
            ("power", "thermal", "sync_boost", "board_limit", "low_utilization", "reliability")
        )
    ),
)

# The bits of nvmlDeviceGetCurrentClocksEventReasons.
CLOCK_EVENT_REASONS: tuple[tuple[int, str], ...] = (
    (0x001, "gpu_idle"),
    (0x002, "applications_clocks_setting"),
    (0x004, "sw_power_cap"),
    (0x008, "hw_slowdown"),
    (0x010, "sync_boost"),
    (0x020, "sw_thermal_slowdown"),
    (0x040, "hw_thermal_slowdown"),
    (0x080, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
)

# nvmlDeviceGetFieldValues, one batch a GPU: NVML_FI_DEV_ + name, quantity, factor, extra labels.
FIELDS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("MEMORY_TEMP", "memory_temperature", CELSIUS, ()),
    ("TEMPERATURE_SHUTDOWN_TLIMIT", "temperature_limit_margin", CELSIUS, ("shutdown",)),
    ("TEMPERATURE_SLOWDOWN_TLIMIT", "temperature_limit_margin", CELSIUS, ("slowdown",)),
    ("TEMPERATURE_MEM_MAX_TLIMIT", "temperature_limit_margin", CELSIUS, ("memory_maximum",)),
    ("TEMPERATURE_GPU_MAX_TLIMIT", "temperature_limit_margin", CELSIUS, ("gpu_maximum",)),
    ("POWER_INSTANT", "power_instant", MILLI, ()),
    ("POWER_AVERAGE", "power_average", MILLI, ()),
    ("POWER_REQUESTED_LIMIT", "power_limit", MILLI, ("requested",)),
    ("CLOCKS_EVENT_REASON_SW_POWER_CAP", "clock_event_time", NANO, ("sw_power_cap",)),
    ("CLOCKS_EVENT_REASON_SYNC_BOOST", "clock_event_time", NANO, ("sync_boost",)),
    ("CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN", "clock_event_time", NANO, ("sw_thermal_slowdown",)),
    ("CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN", "clock_event_time", NANO, ("hw_thermal_slowdown",)),
    ("CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN", "clock_event_time", NANO, ("hw_power_brake_slowdown",)),
    ("PCIE_REPLAY_ROLLOVER_COUNTER", "pcie_replay_rollovers", ONE, ()),
    ("PCIE_COUNT_CORRECTABLE_ERRORS", "pcie_errors", ONE, ("correctable",)),
    ("PCIE_COUNT_NON_FATAL_ERROR", "pcie_errors", ONE, ("non_fatal",)),
    ("PCIE_COUNT_FATAL_ERROR", "pcie_errors", ONE, ("fatal",)),
    ("PCIE_COUNT_RECEIVER_ERROR", "pcie_errors", ONE, ("receiver",)),
    ("PCIE_COUNT_BAD_TLP", "pcie_errors", ONE, ("bad_tlp",)),
    ("PCIE_COUNT_BAD_DLLP", "pcie_errors", ONE, ("bad_dllp",)),
    ("GET_GPU_RECOVERY_ACTION", "recovery_action", ONE, ()),
    ("RETIRED_SBE", "retired_pages", ONE, ("single_bit",)),
    ("RETIRED_DBE", "retired_pages", ONE, ("double_bit",)),
    ("NVLINK_LINK_COUNT", "nvlink_links", ONE, ()),
)

# The same call with the link as scope.
LINK_FIELDS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("NVLINK_GET_STATE", "nvlink_state", ONE, ()),
    ("NVLINK_GET_SPEED", "nvlink_speed", MEGA, ()),
    ("NVLINK_THROUGHPUT_DATA_TX", "nvlink_transmitted", KIB, ()),
    ("NVLINK_THROUGHPUT_DATA_RX", "nvlink_received", KIB, ()),
    ("NVLINK_ERROR_DL_REPLAY", "nvlink_errors", ONE, ("replay",)),
    ("NVLINK_ERROR_DL_RECOVERY", "nvlink_errors", ONE, ("recovery",)),
    ("NVLINK_ERROR_DL_CRC", "nvlink_errors", ONE, ("crc",)),
    ("NVLINK_COUNT_SYMBOL_ERRORS", "nvlink_errors", ONE, ("symbol",)),
    ("NVLINK_COUNT_LINK_RECOVERY_FAILED_EVENTS", "nvlink_errors", ONE, ("recovery_failed",)),
)

# GPU performance monitoring (Hopper and newer): NVML_GPM_METRIC_ + name, quantity, factor.
PERFORMANCE: tuple[tuple[str, str, float], ...] = (
    ("GRAPHICS_UTIL", "graphics_active", PERCENT),
    ("SM_UTIL", "sm_active", PERCENT),
    ("SM_OCCUPANCY", "sm_occupancy", PERCENT),
    ("ANY_TENSOR_UTIL", "tensor_active", PERCENT),
    ("DRAM_BW_UTIL", "dram_active", PERCENT),
    ("FP64_UTIL", "fp64_active", PERCENT),
    ("FP32_UTIL", "fp32_active", PERCENT),
    ("FP16_UTIL", "fp16_active", PERCENT),
    ("INTEGER_UTIL", "integer_active", PERCENT),
    ("PCIE_TX_PER_SEC", "pcie_transmit_rate", MIB),
    ("PCIE_RX_PER_SEC", "pcie_receive_rate", MIB),
    ("NVLINK_TOTAL_TX_PER_SEC", "nvlink_transmit_rate", MIB),
    ("NVLINK_TOTAL_RX_PER_SEC", "nvlink_receive_rate", MIB),
)

# Bytes in all, added up from the rates above: the driver's own counters (PCIE_COUNT_TX_BYTES) have 32 bits, which an
# H200 went round every 1.2 s at 3.5 GB/s.
TOTALS = {"pcie_transmit_rate": "pcie_transmitted", "pcie_receive_rate": "pcie_received"}

# What a MIG device's share is measured by; the links belong to the whole GPU.
MIG_PERFORMANCE = PERFORMANCE[:9]

# What a call was called before: asked when the driver's library does not know the new name.
OLDER = {
    "nvmlDeviceGetTemperatureV": "nvmlDeviceGetTemperature",
    "nvmlDeviceGetCurrentClocksEventReasons": "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetSupportedClocksEventReasons": "nvmlDeviceGetSupportedClocksThrottleReasons",
}

ARCHITECTURES = {
    2: "Kepler", 3: "Maxwell", 4: "Pascal", 5: "Volta", 6: "Turing", 7: "Ampere", 8: "Ada Lovelace", 9: "Hopper",
    10: "Blackwell", 13: "Rubin",
}  # fmt: skip
