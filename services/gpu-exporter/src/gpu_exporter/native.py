"""Our metric names: a row for each family. Renaming one is a breaking change; `docs/gpu-exporter.md` lists them.

A family's labels are `uuid` and `gpu` (NVML's index), and those named in its row.
"""

# ruff: noqa: E501  # tables: a row is a line

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["gauge", "counter"]


class Family(NamedTuple):
    """One metric family and the quantity it shows."""

    name: str
    kind: Kind
    quantity: str
    labels: tuple[str, ...]
    help: str


FAMILIES: tuple[Family, ...] = (
    # utilisation
    Family("gpu_utilization_ratio", "gauge", "utilization", (), "Share of time a kernel ran on the GPU, 0 to 1."),
    Family("gpu_memory_utilization_ratio", "gauge", "memory_utilization", (), "Share of time memory was read or written."),
    Family("gpu_encoder_utilization_ratio", "gauge", "encoder_utilization", (), "Share of time the encoder worked."),
    Family("gpu_decoder_utilization_ratio", "gauge", "decoder_utilization", (), "Share of time the decoder worked."),
    Family("gpu_jpeg_utilization_ratio", "gauge", "jpeg_utilization", (), "Share of time the JPEG engine worked."),
    Family("gpu_ofa_utilization_ratio", "gauge", "ofa_utilization", (), "Share of time the optical flow engine worked."),
    # activity by hardware counters, Hopper and newer
    Family("gpu_graphics_engine_active_ratio", "gauge", "graphics_active", (), "Share of time any work was on the GPU."),
    Family("gpu_sm_active_ratio", "gauge", "sm_active", (), "Share of the multiprocessors that were busy."),
    Family("gpu_sm_occupancy_ratio", "gauge", "sm_occupancy", (), "Resident warps against the most possible."),
    Family("gpu_tensor_active_ratio", "gauge", "tensor_active", (), "Share of time the tensor cores worked."),
    Family("gpu_dram_active_ratio", "gauge", "dram_active", (), "Memory bandwidth used against the most possible."),
    Family("gpu_fp64_active_ratio", "gauge", "fp64_active", (), "Share of time FP64 units worked outside tensor cores."),
    Family("gpu_fp32_active_ratio", "gauge", "fp32_active", (), "Share of time FP32 units worked outside tensor cores."),
    Family("gpu_fp16_active_ratio", "gauge", "fp16_active", (), "Share of time FP16 units worked outside tensor cores."),
    Family("gpu_integer_active_ratio", "gauge", "integer_active", (), "Share of time integer units worked."),
    Family("gpu_pcie_transmit_bytes_per_second", "gauge", "pcie_transmit_rate", (), "PCIe bytes sent in a second."),
    Family("gpu_pcie_receive_bytes_per_second", "gauge", "pcie_receive_rate", (), "PCIe bytes received in a second."),
    Family("gpu_nvlink_transmit_bytes_per_second", "gauge", "nvlink_transmit_rate", (), "NVLink bytes sent in a second, all links."),
    Family("gpu_nvlink_receive_bytes_per_second", "gauge", "nvlink_receive_rate", (), "NVLink bytes received in a second, all links."),
    # memory
    Family("gpu_memory_total_bytes", "gauge", "memory_total", (), "Memory of the GPU."),
    Family("gpu_memory_used_bytes", "gauge", "memory_used", (), "Memory that processes hold."),
    Family("gpu_memory_free_bytes", "gauge", "memory_free", (), "Memory that can be taken."),
    Family("gpu_memory_reserved_bytes", "gauge", "memory_reserved", (), "Memory that driver and firmware keep."),
    Family("gpu_bar1_memory_total_bytes", "gauge", "bar1_total", (), "Window through which others reach the memory."),
    Family("gpu_bar1_memory_used_bytes", "gauge", "bar1_used", (), "Part of that window in use."),
    Family("gpu_bar1_memory_free_bytes", "gauge", "bar1_free", (), "Part of that window free."),
    # temperature
    Family("gpu_temperature_celsius", "gauge", "temperature", (), "Temperature of the GPU."),
    Family("gpu_memory_temperature_celsius", "gauge", "memory_temperature", (), "Temperature of the memory."),
    Family("gpu_temperature_margin_celsius", "gauge", "temperature_margin", (), "Degrees left before the GPU slows down."),
    Family("gpu_temperature_threshold_celsius", "gauge", "temperature_threshold", ("threshold",), "Temperature at which the threshold acts."),
    Family("gpu_temperature_limit_margin_celsius", "gauge", "temperature_limit_margin", ("threshold",), "Margin at which the threshold acts."),
    # power and energy
    Family("gpu_power_watts", "gauge", "power", (), "Power draw as nvidia-smi reports it."),
    Family("gpu_power_instant_watts", "gauge", "power_instant", (), "Power draw at the instant of the sample."),
    Family("gpu_power_average_watts", "gauge", "power_average", (), "Power draw averaged over a second."),
    Family("gpu_power_limit_watts", "gauge", "power_limit", ("limit",), "Power limit: enforced, default, minimum, maximum, requested."),
    Family("gpu_energy_joules_total", "counter", "energy", (), "Energy used since the driver was loaded."),
    # clocks
    Family("gpu_clock_hertz", "gauge", "clock", ("clock",), "Clock now."),
    Family("gpu_clock_maximum_hertz", "gauge", "clock_maximum", ("clock",), "Highest clock."),
    Family("gpu_clock_event_active", "gauge", "clock_event", ("reason",), "1 while clocks are lowered for the reason."),
    Family("gpu_clock_event_seconds_total", "counter", "clock_event_time", ("reason",), "Time clocks were lowered for the reason."),
    Family("gpu_violation_seconds_total", "counter", "violation", ("policy",), "Time clocks were held below what was asked for."),
    Family("gpu_performance_state", "gauge", "performance_state", (), "0 is the fastest, 15 the slowest."),
    # errors
    Family("gpu_ecc_mode", "gauge", "ecc_mode", (), "1 when memory errors are corrected."),
    Family("gpu_ecc_mode_pending", "gauge", "ecc_mode_pending", (), "The mode after the next reset."),
    Family("gpu_ecc_errors_total", "counter", "ecc_errors", ("kind", "scope"), "Memory errors: volatile since reset, aggregate for life."),
    Family("gpu_retired_pages_total", "counter", "retired_pages", ("cause",), "Memory pages taken out of use."),
    Family("gpu_retired_pages_pending", "gauge", "retired_pages_pending", (), "1 when pages wait for a reset to be retired."),
    Family("gpu_remapped_rows_total", "counter", "remapped_rows", ("cause",), "Memory rows replaced by spare ones."),
    Family("gpu_row_remap_pending", "gauge", "row_remap_pending", (), "1 when a row waits for a reset to be replaced."),
    Family("gpu_row_remap_failure", "gauge", "row_remap_failure", (), "1 when a row could not be replaced."),
    Family("gpu_row_remap_banks", "gauge", "row_remap_banks", ("availability",), "Memory banks by spare rows left."),
    Family("gpu_recovery_action", "gauge", "recovery_action", (), "0 none, 1 GPU reset, 2 node reboot, 3 drain peers, 4 drain and reset, 5 recover IMEX, 6 bus reset, 7 system reboot."),
    # PCIe
    Family("gpu_pcie_link_generation", "gauge", "pcie_generation", (), "PCIe generation now; lower while idle."),
    Family("gpu_pcie_link_generation_maximum", "gauge", "pcie_generation_maximum", (), "Highest generation of GPU and slot."),
    Family("gpu_pcie_link_width", "gauge", "pcie_width", (), "PCIe lanes now."),
    Family("gpu_pcie_link_width_maximum", "gauge", "pcie_width_maximum", (), "Most lanes of GPU and slot."),
    Family("gpu_pcie_replays_total", "counter", "pcie_replays", (), "PCIe packets sent again."),
    Family("gpu_pcie_replay_rollovers_total", "counter", "pcie_replay_rollovers", (), "Times the replay number rolled over."),
    Family("gpu_pcie_errors_total", "counter", "pcie_errors", ("kind",), "PCIe errors."),
    Family("gpu_pcie_transmitted_bytes_total", "counter", "pcie_transmitted", (), "PCIe bytes sent, headers included, since the probe started."),
    Family("gpu_pcie_received_bytes_total", "counter", "pcie_received", (), "PCIe bytes received, headers included, since the probe started."),
    Family("gpu_pcie_throughput_bytes_per_second", "gauge", "pcie_throughput", ("direction",), "PCIe throughput over 20 ms (GPU_PCIE_THROUGHPUT)."),
    # NVLink
    Family("gpu_nvlink_links", "gauge", "nvlink_links", (), "Links of the GPU."),
    Family("gpu_nvlink_state", "gauge", "nvlink_state", ("link",), "0 inactive, 1 active, 2 asleep, 3 traffic disabled."),
    Family("gpu_nvlink_speed_bytes_per_second", "gauge", "nvlink_speed", ("link",), "Speed of the link."),
    Family("gpu_nvlink_transmitted_bytes_total", "counter", "nvlink_transmitted", ("link",), "Data sent."),
    Family("gpu_nvlink_received_bytes_total", "counter", "nvlink_received", ("link",), "Data received."),
    Family("gpu_nvlink_errors_total", "counter", "nvlink_errors", ("link", "kind"), "Errors on the link."),
    # the rest
    Family("gpu_fan_speed_ratio", "gauge", "fan_speed", ("fan",), "Fan speed asked for, 1 is full speed."),
    Family("gpu_persistence_mode", "gauge", "persistence_mode", (), "1 when the driver stays loaded without users."),
    Family("gpu_compute_mode", "gauge", "compute_mode", (), "0 default, 2 prohibited, 3 one process at a time."),
    Family("gpu_mig_mode", "gauge", "mig_mode", (), "1 when the GPU can be cut into instances."),
    Family("gpu_mig_mode_pending", "gauge", "mig_mode_pending", (), "The mode after the next reset."),
    Family("gpu_processes", "gauge", "processes", (), "Processes that compute on the GPU (GPU_PROCESSES)."),
    Family("gpu_process_memory_bytes", "gauge", "process_memory", ("container",), "Memory of processes by container (GPU_PROCESSES)."),
)  # fmt: skip

# Of MIG devices, with labels `gpu_instance` and `compute_instance`.
MIG_FAMILIES: tuple[Family, ...] = (
    Family("gpu_mig_memory_total_bytes", "gauge", "memory_total", (), "Memory of the instance."),
    Family("gpu_mig_memory_used_bytes", "gauge", "memory_used", (), "Memory that processes hold in the instance."),
    Family("gpu_mig_memory_free_bytes", "gauge", "memory_free", (), "Memory of the instance that can be taken."),
    Family("gpu_mig_memory_reserved_bytes", "gauge", "memory_reserved", (), "Memory of the instance that the driver keeps."),
    Family("gpu_mig_graphics_engine_active_ratio", "gauge", "graphics_active", (), "Share of time any work was on the instance."),
    Family("gpu_mig_sm_active_ratio", "gauge", "sm_active", (), "Share of the instance's multiprocessors that were busy."),
    Family("gpu_mig_sm_occupancy_ratio", "gauge", "sm_occupancy", (), "Resident warps against the most possible."),
    Family("gpu_mig_tensor_active_ratio", "gauge", "tensor_active", (), "Share of time the tensor cores worked."),
    Family("gpu_mig_dram_active_ratio", "gauge", "dram_active", (), "Memory bandwidth used against the most possible."),
)  # fmt: skip
