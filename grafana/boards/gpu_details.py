"""The GPUs' less needed readings, and the exporter that tells of them."""

from grafana.boards.gpu_words import GPU, NAME, RATE, by, one, rate, several
from grafana.panels import GREEN, RED, Panel, Query, lines

DETAILS = (
    (
        "Details",
        (
            Panel(
                "What they are",
                "Name, driver, serial.",
                (Query(f"gpu_info{{{GPU}}}", instant=True),),
                kind="table",
                width=24,
                height=5,
            ),
            lines(
                "Modes",
                "ECC, persistence, compute and MIG mode, now and after the next reset.",
                *several(
                    ("gpu_ecc_mode", "ECC"),
                    ("gpu_ecc_mode_pending", "ECC pending"),
                    ("gpu_persistence_mode", "persistence"),
                    ("gpu_compute_mode", "compute"),
                    ("gpu_mig_mode", "MIG"),
                    ("gpu_mig_mode_pending", "MIG pending"),
                ),
                decimals=0,
            ),
            lines(
                "Memory taken out of use",
                "Retired pages and remapped rows, and banks by spare rows left.",
                one("gpu_retired_pages_total", by("cause")),
                one("gpu_retired_pages_pending", f"{NAME} pages pending"),
                one("gpu_remapped_rows_total", by("cause")),
                one("gpu_row_remap_banks", by("availability")),
                decimals=0,
            ),
            lines(
                "Time below what was asked",
                "Share of time clocks were held below the request, by policy.",
                rate("gpu_violation_seconds_total", by("policy")),
                unit="percentunit",
            ),
            lines(
                "Processes",
                "Programs on the GPU, and their memory by container.",
                one("gpu_processes", f"{NAME} processes"),
                one("gpu_process_memory_bytes", by("container")),
            ),
            lines(
                "BAR1 window",
                "Window through which others reach the GPU's memory.",
                *several(
                    ("gpu_bar1_memory_used_bytes", "used"),
                    ("gpu_bar1_memory_free_bytes", "free"),
                    ("gpu_bar1_memory_total_bytes", "total"),
                ),
                unit="bytes",
            ),
            lines(
                "XID errors",
                "Counted by number, and when the last one came (hours ago).",
                rate("gpu_xid_errors_total", by("xid")),
                Query(f"(time() - gpu_xid_last_timestamp_seconds{{{GPU}}}) / 3600", f"{by('xid')} hours ago"),
            ),
            lines(
                "MIG instances: memory",
                "Of GPUs that are cut into instances.",
                *several(
                    ("gpu_mig_memory_used_bytes", "used"),
                    ("gpu_mig_memory_free_bytes", "free"),
                    ("gpu_mig_memory_reserved_bytes", "reserved"),
                    ("gpu_mig_memory_total_bytes", "total"),
                ),
                unit="bytes",
                width=12,
            ),
            lines(
                "MIG instances: load",
                "Of GPUs that are cut into instances.",
                *several(
                    ("gpu_mig_graphics_engine_active_ratio", "any work"),
                    ("gpu_mig_sm_active_ratio", "multiprocessors"),
                    ("gpu_mig_sm_occupancy_ratio", "occupancy"),
                    ("gpu_mig_tensor_active_ratio", "tensor"),
                    ("gpu_mig_dram_active_ratio", "bandwidth"),
                ),
                unit="percentunit",
                width=12,
            ),
        ),
    ),
    (
        "The exporter",
        (
            Panel(
                "Versions",
                "Exporter and driver.",
                (
                    Query("gpu_exporter_info", "{{version}} {{source}}"),
                    Query("gpu_driver_info", "driver {{driver_version}}"),
                ),
                kind="stat",
                width=24,
                height=4,
                options={"textMode": "name"},
            ),
            Panel(
                "Collecting",
                "Whether the last sample succeeded, and what state the exporter is in.",
                (
                    Query("gpu_exporter_last_collect_success", "success"),
                    Query("gpu_exporter_state == 1", "{{state}}"),
                ),
                kind="state-timeline",
                words={"1": ("yes", GREEN), "0": ("no", RED)},
            ),
            lines(
                "A sample",
                "How long it takes, and how old the newest is.",
                Query("gpu_exporter_last_collect_duration_seconds", "duration"),
                Query("time() - (gpu_exporter_last_collect_timestamp_seconds > 0)", "age"),
                unit="s",
            ),
            lines(
                "Failures",
                "Samples that failed, driver calls that failed, helper processes that were replaced or are stuck.",
                Query(f"rate(gpu_exporter_failed_collects_total{RATE})", "samples"),
                Query(f"rate(gpu_exporter_collects_total{RATE})", "tried"),
                Query(f"rate(gpu_exporter_call_failures_total{RATE})", "{{call}} {{error}}"),
                Query("gpu_exporter_probe_replacements_total", "replacements"),
                Query("gpu_exporter_stuck_probes", "stuck"),
                Query("gpu_exporter_last_collect_calls", "driver calls a sample"),
                Query("time() - (gpu_exporter_last_hang_timestamp_seconds > 0)", "seconds since a call hung"),
            ),
        ),
    ),
)
