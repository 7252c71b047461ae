"""The GPUs: load, memory, heat, health, and the exporter that tells of them."""

from grafana.boards.gpu_details import DETAILS
from grafana.boards.gpu_words import GPU, NAME, RATE, by, one, rate, several
from grafana.panels import BAD_AT_ONE, GREEN, RED, YELLOW, Board, Panel, Query, Variable, lines

BOARD = Board(
    uid="gpus",
    title="GPUs",
    why="Load, memory, heat and health of the GPUs, as NVML gives it. What a GPU does not support stays empty.",
    variables=(Variable("gpu", "GPU", "label_values(gpu_info, gpu)"),),
    rows=(
        (
            "Health",
            (
                Panel(
                    "GPUs seen",
                    "Visible to the exporter, against those it expects: one that fell off the bus is missing here.",
                    (Query("gpu_visible", "visible"), Query("gpu_expected", "expected")),
                    kind="stat",
                    width=6,
                    height=5,
                    decimals=0,
                ),
                Panel(
                    "Action needed",
                    "What the driver asks for. Anything but none: plan an interruption.",
                    (Query(f"gpu_recovery_action{{{GPU}}}", NAME),),
                    kind="stat",
                    width=6,
                    height=5,
                    words={
                        "0": ("none", GREEN),
                        "1": ("GPU reset", RED),
                        "2": ("node reboot", RED),
                        "3": ("drain peers", YELLOW),
                        "4": ("drain and reset", RED),
                        "5": ("recover IMEX", YELLOW),
                        "6": ("bus reset", RED),
                        "7": ("system reboot", RED),
                    },
                ),
                Panel(
                    "XID errors of a day",
                    "Messages of the driver about the GPU, by number. 13, 31 and 43 are a program's fault.",
                    (Query(f"sum by (gpu, xid) (increase(gpu_xid_errors_total{{{GPU}}}[24h]))", by("xid")),),
                    kind="stat",
                    width=6,
                    height=5,
                    steps=BAD_AT_ONE,
                    decimals=0,
                ),
                Panel(
                    "Row remaps",
                    "Failures (replace the GPU) and rows that wait for a reset.",
                    several(("gpu_row_remap_failure", "failed"), ("gpu_row_remap_pending", "pending")),
                    kind="stat",
                    width=6,
                    height=5,
                    steps=BAD_AT_ONE,
                ),
                Panel(
                    "Readable",
                    "Each GPU that was ever seen: green gives data.",
                    (Query(f"gpu_up{{{GPU}}}", NAME),),
                    kind="state-timeline",
                    width=24,
                    height=4,
                    words={"1": ("yes", GREEN), "0": ("no", RED)},
                ),
                lines(
                    "Time slowed down",
                    "Share of time clocks were lowered, by reason. Power cap is normal under load, heat is not.",
                    Query(f"rate(gpu_clock_event_seconds_total{{{GPU}}}{RATE}) > 0", by("reason")),
                    unit="percentunit",
                ),
                lines(
                    "Memory errors",
                    "Corrected ones happen; an uncorrected one ended a program.",
                    rate("gpu_ecc_errors_total", by("kind", "scope")),
                    unit="ops",
                ),
                lines(
                    "Throttling now",
                    "1 while clocks are lowered for the reason.",
                    Query(f"gpu_clock_event_active{{{GPU}}} == 1", by("reason")),
                ),
            ),
        ),
        (
            "Load",
            (
                lines(
                    "Busy", "Share of time any kernel ran.", one("gpu_utilization_ratio"), unit="percentunit", maximum=1
                ),
                lines(
                    "Tensor cores and memory bandwidth",
                    "What a language model uses: tensor cores in prefill, bandwidth in decode.",
                    *several(("gpu_tensor_active_ratio", "tensor"), ("gpu_dram_active_ratio", "bandwidth")),
                    unit="percentunit",
                    maximum=1,
                ),
                lines(
                    "Memory",
                    "Held by programs, and what the driver keeps. vLLM takes its share at start and keeps it.",
                    *several(
                        ("gpu_memory_used_bytes", "used"),
                        ("gpu_memory_reserved_bytes", "reserved"),
                        ("gpu_memory_free_bytes", "free"),
                    ),
                    Query(f"gpu_memory_total_bytes{{{GPU}}}", f"{NAME} total"),
                    unit="bytes",
                ),
                lines(
                    "Multiprocessors",
                    "Busy ones, and how full they are.",
                    *several(
                        ("gpu_graphics_engine_active_ratio", "any work"),
                        ("gpu_sm_active_ratio", "busy"),
                        ("gpu_sm_occupancy_ratio", "occupancy"),
                    ),
                    unit="percentunit",
                    maximum=1,
                ),
                lines(
                    "Arithmetic units",
                    "By kind of number, outside the tensor cores.",
                    *several(
                        ("gpu_fp64_active_ratio", "FP64"),
                        ("gpu_fp32_active_ratio", "FP32"),
                        ("gpu_fp16_active_ratio", "FP16"),
                        ("gpu_integer_active_ratio", "integer"),
                    ),
                    unit="percentunit",
                ),
                lines(
                    "Other engines",
                    "Memory controller, video and image engines.",
                    *several(
                        ("gpu_memory_utilization_ratio", "memory"),
                        ("gpu_encoder_utilization_ratio", "encoder"),
                        ("gpu_decoder_utilization_ratio", "decoder"),
                        ("gpu_jpeg_utilization_ratio", "JPEG"),
                        ("gpu_ofa_utilization_ratio", "optical flow"),
                    ),
                    unit="percentunit",
                ),
            ),
        ),
        (
            "Power and heat",
            (
                lines(
                    "Power",
                    "Draw, and the limit that is enforced.",
                    *several(
                        ("gpu_power_watts", "draw"),
                        ("gpu_power_instant_watts", "instant"),
                        ("gpu_power_average_watts", "average"),
                    ),
                    one("gpu_power_limit_watts", by("limit")),
                    unit="watt",
                ),
                lines(
                    "Energy by use",
                    "Watts that went into calls and into waiting for calls, as the gateway divides them; unknown: "
                    "told at once after a GPU could not be read for over a minute.",
                    Query(f"sum by (use) (rate(gateway_energy_joules_total{RATE}))", "{{use}}"),
                    Query(f"sum(rate(gpu_energy_joules_total{{{GPU}}}{RATE}))", "all GPUs"),
                    unit="watt",
                ),
                lines(
                    "Temperature",
                    "GPU and memory.",
                    *several(("gpu_temperature_celsius", "GPU"), ("gpu_memory_temperature_celsius", "memory")),
                    unit="celsius",
                ),
                lines(
                    "Distance to slowdown",
                    "Degrees left before the GPU slows itself down, and the margins at which it acts.",
                    one("gpu_temperature_margin_celsius", f"{NAME} left"),
                    one("gpu_temperature_limit_margin_celsius", by("threshold")),
                    unit="celsius",
                    minimum=None,
                ),
                lines(
                    "Temperature limits",
                    "At which temperature what happens.",
                    one("gpu_temperature_threshold_celsius", by("threshold")),
                    unit="celsius",
                ),
                lines("Fans", "Speed asked for.", one("gpu_fan_speed_ratio", by("fan")), unit="percentunit", maximum=1),
                lines(
                    "Clocks",
                    "Now, and the highest possible.",
                    one("gpu_clock_hertz", by("clock")),
                    one("gpu_clock_maximum_hertz", f"{by('clock')} maximum"),
                    unit="hertz",
                    width=16,
                ),
                lines("Performance state", "0 is the fastest.", one("gpu_performance_state"), decimals=0),
            ),
        ),
        (
            "Links",
            (
                lines(
                    "PCIe traffic",
                    "Bytes a second. Much of it with tensor parallelism: no NVLink.",
                    rate("gpu_pcie_transmitted_bytes_total", f"{NAME} sent"),
                    rate("gpu_pcie_received_bytes_total", f"{NAME} received"),
                    one("gpu_pcie_transmit_bytes_per_second", f"{NAME} sent, last sample"),
                    one("gpu_pcie_receive_bytes_per_second", f"{NAME} received, last sample"),
                    one("gpu_pcie_throughput_bytes_per_second", by("direction")),
                    unit="Bps",
                ),
                lines(
                    "PCIe link",
                    "Generation and lanes now and at most. Lower while idle is normal, lower under load is not.",
                    *several(
                        ("gpu_pcie_link_generation", "generation"),
                        ("gpu_pcie_link_generation_maximum", "generation at most"),
                        ("gpu_pcie_link_width", "lanes"),
                        ("gpu_pcie_link_width_maximum", "lanes at most"),
                    ),
                    decimals=0,
                ),
                lines(
                    "PCIe errors",
                    "Packets sent again and errors. A steady rate: reseat the card.",
                    rate("gpu_pcie_replays_total", f"{NAME} replays"),
                    rate("gpu_pcie_replay_rollovers_total", f"{NAME} rollovers"),
                    rate("gpu_pcie_errors_total", by("kind")),
                    unit="ops",
                ),
                lines(
                    "NVLink traffic",
                    "Bytes a second between the GPUs, all links.",
                    Query(f"sum by (gpu) (rate(gpu_nvlink_transmitted_bytes_total{{{GPU}}}{RATE}))", f"{NAME} sent"),
                    Query(f"sum by (gpu) (rate(gpu_nvlink_received_bytes_total{{{GPU}}}{RATE}))", f"{NAME} received"),
                    one("gpu_nvlink_transmit_bytes_per_second", f"{NAME} sent (profiling)"),
                    one("gpu_nvlink_receive_bytes_per_second", f"{NAME} received (profiling)"),
                    unit="Bps",
                ),
                lines(
                    "NVLink errors",
                    "By kind. Any: look at the bridge.",
                    Query(f"sum by (gpu, kind) (rate(gpu_nvlink_errors_total{{{GPU}}}{RATE}))", by("kind")),
                    unit="ops",
                ),
                lines(
                    "NVLink links",
                    "Links of the GPU, those that are active, and their speed together.",
                    one("gpu_nvlink_links", f"{NAME} links"),
                    Query(f"count by (gpu) (gpu_nvlink_state{{{GPU}}} == 1)", f"{NAME} active"),
                    Query(f"sum by (gpu) (gpu_nvlink_speed_bytes_per_second{{{GPU}}}) / 1e9", f"{NAME} GB/s"),
                ),
            ),
        ),
        *DETAILS,
    ),
)
