"""DCGM's metric names, units and labels, for dashboards and alerts written for NVIDIA's dcgm-exporter.

Sources: dcgm-exporter's `default-counters.csv` (what is on by default, and the well-known optional fields) and DCGM's
field reference for units. Two fields are gauges here where dcgm-exporter says counter, because DCGM publishes a rate
(DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL) or a yes/no (DCGM_FI_DEV_RETIRED_PENDING). Not offered: vGPU licences.
"""

# ruff: noqa: E501  # tables: a row is a line

from __future__ import annotations

from typing import NamedTuple

from gpu_exporter.native import Kind

MIB = 1024.0 * 1024.0


class Field(NamedTuple):
    """One DCGM field: the reading of `quantity` whose extra labels are `labels`, times `factor`."""

    name: str
    kind: Kind
    quantity: str
    labels: tuple[str, ...]
    factor: float
    help: str


FIELDS: tuple[Field, ...] = (
    Field("DCGM_FI_DEV_SM_CLOCK", "gauge", "clock", ("sm",), 1e-6, "SM clock frequency (in MHz)."),
    Field("DCGM_FI_DEV_MEM_CLOCK", "gauge", "clock", ("memory",), 1e-6, "Memory clock frequency (in MHz)."),
    Field("DCGM_FI_DEV_MEMORY_TEMP", "gauge", "memory_temperature", (), 1, "Memory temperature (in C)."),
    Field("DCGM_FI_DEV_GPU_TEMP", "gauge", "temperature", (), 1, "GPU temperature (in C)."),
    Field("DCGM_FI_DEV_POWER_USAGE", "gauge", "power", (), 1, "Power draw (in W)."),
    Field("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", "energy", (), 1e3, "Total energy consumption since boot (in mJ)."),
    Field("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "counter", "pcie_replays", (), 1, "Total number of PCIe retries."),
    Field("DCGM_FI_DEV_GPU_UTIL", "gauge", "utilization", (), 100, "GPU utilization (in %)."),
    Field("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "memory_utilization", (), 100, "Memory utilization (in %)."),
    Field("DCGM_FI_DEV_ENC_UTIL", "gauge", "encoder_utilization", (), 100, "Encoder utilization (in %)."),
    Field("DCGM_FI_DEV_DEC_UTIL", "gauge", "decoder_utilization", (), 100, "Decoder utilization (in %)."),
    Field("DCGM_FI_DEV_FB_FREE", "gauge", "memory_free", (), 1 / MIB, "Framebuffer memory free (in MiB)."),
    Field("DCGM_FI_DEV_FB_USED", "gauge", "memory_used", (), 1 / MIB, "Framebuffer memory used (in MiB)."),
    Field("DCGM_FI_DEV_FB_RESERVED", "gauge", "memory_reserved", (), 1 / MIB, "Framebuffer memory reserved (in MiB)."),
    Field("DCGM_FI_DEV_FB_TOTAL", "gauge", "memory_total", (), 1 / MIB, "Framebuffer memory total (in MiB)."),
    Field("DCGM_FI_DEV_BAR1_USED", "gauge", "bar1_used", (), 1 / MIB, "BAR1 memory used (in MiB)."),
    Field("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", "remapped_rows", ("uncorrectable",), 1, "Number of remapped rows for uncorrectable errors."),
    Field("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "counter", "remapped_rows", ("correctable",), 1, "Number of remapped rows for correctable errors."),
    Field("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "row_remap_failure", (), 1, "Whether remapping of rows has failed."),
    Field("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "counter", "ecc_errors", ("corrected", "volatile"), 1, "Total number of single-bit volatile ECC errors."),
    Field("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "counter", "ecc_errors", ("uncorrected", "volatile"), 1, "Total number of double-bit volatile ECC errors."),
    Field("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", "counter", "ecc_errors", ("corrected", "aggregate"), 1, "Total number of single-bit persistent ECC errors."),
    Field("DCGM_FI_DEV_ECC_DBE_AGG_TOTAL", "counter", "ecc_errors", ("uncorrected", "aggregate"), 1, "Total number of double-bit persistent ECC errors."),
    Field("DCGM_FI_DEV_RETIRED_SBE", "counter", "retired_pages", ("single_bit",), 1, "Total number of retired pages due to single-bit errors."),
    Field("DCGM_FI_DEV_RETIRED_DBE", "counter", "retired_pages", ("double_bit",), 1, "Total number of retired pages due to double-bit errors."),
    Field("DCGM_FI_DEV_RETIRED_PENDING", "gauge", "retired_pages_pending", (), 1, "Whether pages are pending retirement."),
    Field("DCGM_FI_DEV_POWER_VIOLATION", "counter", "violation", ("power",), 1e9, "Throttling duration due to power constraints (in ns)."),
    Field("DCGM_FI_DEV_THERMAL_VIOLATION", "counter", "violation", ("thermal",), 1e9, "Throttling duration due to thermal constraints (in ns)."),
    Field("DCGM_FI_DEV_SYNC_BOOST_VIOLATION", "counter", "violation", ("sync_boost",), 1e9, "Throttling duration due to sync-boost constraints (in ns)."),
    Field("DCGM_FI_DEV_BOARD_LIMIT_VIOLATION", "counter", "violation", ("board_limit",), 1e9, "Throttling duration due to board limit constraints (in ns)."),
    Field("DCGM_FI_DEV_LOW_UTIL_VIOLATION", "counter", "violation", ("low_utilization",), 1e9, "Throttling duration due to low utilization (in ns)."),
    Field("DCGM_FI_DEV_RELIABILITY_VIOLATION", "counter", "violation", ("reliability",), 1e9, "Throttling duration due to reliability constraints (in ns)."),
    Field("DCGM_FI_DEV_POWER_MGMT_LIMIT", "gauge", "power_limit", ("enforced",), 1, "Current power limit (in W)."),
    Field("DCGM_FI_DEV_FAN_SPEED", "gauge", "fan_speed", ("0",), 100, "Fan speed (in %)."),
    Field("DCGM_FI_DEV_NVLINK_BANDWIDTH_TOTAL", "gauge", "nvlink_data_rate", (), 1 / 1024 / 1000, "NVLink data sent and received, all links (in KiB/s / 1000)."),
    Field("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "gauge", "graphics_active", (), 1, "Ratio of time the graphics engine is active."),
    Field("DCGM_FI_PROF_SM_ACTIVE", "gauge", "sm_active", (), 1, "The ratio of cycles an SM has at least 1 warp assigned."),
    Field("DCGM_FI_PROF_SM_OCCUPANCY", "gauge", "sm_occupancy", (), 1, "The ratio of number of warps resident on an SM."),
    Field("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "gauge", "tensor_active", (), 1, "Ratio of cycles the tensor (HMMA) pipe is active."),
    Field("DCGM_FI_PROF_PIPE_FP64_ACTIVE", "gauge", "fp64_active", (), 1, "Ratio of cycles the fp64 pipes are active."),
    Field("DCGM_FI_PROF_PIPE_FP32_ACTIVE", "gauge", "fp32_active", (), 1, "Ratio of cycles the fp32 pipes are active."),
    Field("DCGM_FI_PROF_PIPE_FP16_ACTIVE", "gauge", "fp16_active", (), 1, "Ratio of cycles the fp16 pipes are active."),
    Field("DCGM_FI_PROF_DRAM_ACTIVE", "gauge", "dram_active", (), 1, "Ratio of cycles the device memory interface is active."),
    Field("DCGM_FI_PROF_PCIE_TX_BYTES", "gauge", "pcie_transmit_rate", (), 1, "The rate of data transmitted over the PCIe bus (in B/s)."),
    Field("DCGM_FI_PROF_PCIE_RX_BYTES", "gauge", "pcie_receive_rate", (), 1, "The rate of data received over the PCIe bus (in B/s)."),
    Field("DCGM_FI_PROF_NVLINK_TX_BYTES", "gauge", "nvlink_transmit_rate", (), 1, "The rate of data transmitted over NVLink (in B/s)."),
    Field("DCGM_FI_PROF_NVLINK_RX_BYTES", "gauge", "nvlink_receive_rate", (), 1, "The rate of data received over NVLink (in B/s)."),
)  # fmt: skip

# What DCGM gives for each MIG device, with labels GPU_I_ID and GPU_I_PROFILE beside the GPU's own series.
MIG_FIELDS = frozenset(
    {
        "DCGM_FI_DEV_FB_FREE",
        "DCGM_FI_DEV_FB_USED",
        "DCGM_FI_DEV_FB_RESERVED",
        "DCGM_FI_DEV_FB_TOTAL",
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
        "DCGM_FI_PROF_SM_ACTIVE",
        "DCGM_FI_PROF_SM_OCCUPANCY",
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        "DCGM_FI_PROF_DRAM_ACTIVE",
    }
)

XID = Field("DCGM_FI_DEV_XID_ERRORS", "gauge", "", (), 1, "Value of the last XID error encountered.")
# DCGM's gauge keeps its value for ever; ours goes back to 0, so that an alert on it ends.
XID_SECONDS = 600.0
