"""Does a model fit? Memory by GPU count and quantization, from a shape and a size of memory. Pure.

The KV cache is counted the way vLLM's block pool counts it: layers of one kind form groups, a block holds a few tokens
of one group, and a sequence in a layer with a sliding window needs no more blocks than the window and one step. On GPUs
two figures are estimates: what the runtime takes beside the weights, and the largest activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine.shape import QUANTIZED, Shape

GIB = 1 << 30
RUNTIME_BYTES = 1.2 * GIB  # estimate: CUDA context, NCCL buffers, captured graphs, on each GPU
WORTH_SEQUENCES = 1.0  # fewer than one sequence of full length, and vLLM refuses to start


@dataclass(frozen=True)
class Batch:
    """How much vLLM computes at once."""

    step: int  # tokens
    sequences: int
    steps: int  # at once

    @property
    def in_flight(self) -> int:
        """Tokens that are being computed, whose blocks a sliding window cannot give back yet."""
        return self.step * self.steps


def gpu_batch(memory: float, stages: int, step: int | None = None, sequences: int | None = None) -> Batch:
    """What vLLM 0.32's API server takes on GPUs of `memory` bytes (`get_batch_defaults`), unless it is told.

    It prepares one step while `stages` are computed. A100s with 80 GB take the smallest step too, which their size does
    not tell: their figures here are on the safe side.
    """
    usual = (16384, 1024) if memory >= 160 * GIB else (8192, 1024) if memory >= 70 * GIB else (2048, 256)
    return Batch(step or usual[0], sequences or usual[1], stages + 1)


def cpu_batch(world: int, step: int | None = None) -> Batch:
    """The same for the CPU build with `world` processes, which prepares nothing."""
    return Batch(step or 2048 * world, 128 * world, 1)


@dataclass(frozen=True)
class Capacity:
    """What a KV cache of a given size holds."""

    tokens: int
    sequences: float  # of full length, at once


@dataclass(frozen=True)
class Plan:
    """One row: a model on `tp` GPUs under one quantization. Bytes are of one GPU."""

    tp: int
    method: str
    weights: float
    beside: float
    cache: float
    capacity: Capacity
    problem: str | None

    @property
    def fits(self) -> bool:
        """Whether vLLM would start like this."""
        return self.problem is None


def block_bytes(shape: Shape, tp: int, block: int, element: float) -> float:
    """One block of the pool on one GPU: `block` tokens of one group of layers."""
    return _group_layers(shape) * block * shape.kv_layer_bytes(tp, element)


def capacity(
    shape: Shape, cache: float, length: int, *, in_flight: int, tp: int = 1, block: int = 16, element: float = 2.0
) -> Capacity:
    """What `cache` bytes a GPU hold when sequences are `length` long and `in_flight` tokens are being computed."""
    blocks = int(cache // block_bytes(shape, tp, block, element))
    group = _group_layers(shape)
    full_layers = shape.layers - shape.window_layers
    needed = math.ceil(full_layers / group) * math.ceil(length / block)
    if shape.window_layers and shape.window is not None:
        seen = min(shape.window - 1 + in_flight, length)
        needed += math.ceil(shape.window_layers / group) * (math.ceil(seen / block) + 1)
    sequences = blocks / needed
    return Capacity(int(sequences * length), sequences)


def _group_layers(shape: Shape) -> int:
    """Layers in one group: as vLLM forms them, so that blocks of all kinds have one size."""
    full = shape.layers - shape.window_layers
    if not shape.window_layers or not full:
        return shape.layers
    few, many = sorted((full, shape.window_layers))
    return many if many < few * 1.25 else few


def plan(
    shape: Shape,
    memory: float,
    tp: int,
    method: str,
    *,
    share: float,
    length: int,
    batch: Batch,
    element: float = 2.0,
    weight_bytes: float | None = None,
) -> Plan:
    """The row for `memory` bytes a GPU, of which vLLM takes `share`; `weight_bytes` is the checkpoint's own size."""
    total = shape.weight_bytes(method) if weight_bytes is None else weight_bytes
    weights = total / tp
    # Estimate: the widest layer of one step, and the logits of all sequences in four bytes.
    beside = RUNTIME_BYTES + batch.step * shape.hidden * 2 * 6 + batch.sequences * shape.vocab / tp * 4
    cache = memory * share - weights - beside
    problem = shape.divides(tp)
    room = Capacity(0, 0.0)
    if problem is None and cache <= 0:
        problem = f"the weights take {weights / GIB:.1f} GiB of {memory * share / GIB:.1f} GiB"
    elif problem is None:
        room = capacity(shape, cache, length, tp=tp, element=element, in_flight=batch.in_flight)
        if room.sequences < WORTH_SEQUENCES:
            problem = f"room for {room.tokens} tokens, less than one sequence of {length}"
    return Plan(tp, method, weights, beside, max(cache, 0.0), room, problem)


def table(shape: Shape, memory: float, *, share: float, length: int, batch: Batch, element: float = 2.0) -> list[Plan]:
    """The rows for 1, 2 and 4 GPUs under each quantization; a quantized checkpoint stays what it is."""
    methods: Sequence[str] = list(QUANTIZED)
    return [
        plan(shape, memory, tp, method, share=share, length=length, batch=batch, element=element)
        for tp in (1, 2, 4)
        for method in methods
    ]


def advice(
    rows: Sequence[Plan], wanted: Plan, shape: Shape, memory: float, *, share: float, element: float, batch: Batch
) -> str:
    """One sentence: yes, or what to change, the smallest change first."""
    if wanted.fits:
        room = wanted.capacity
        return f"yes: {room.tokens} tokens of KV cache, {room.sequences:.1f} sequences of full length at once"
    if (reason := shape.divides(wanted.tp)) is not None:
        return f"no: TP_SIZE={reason}"
    cache = memory * share - wanted.weights - wanted.beside
    if cache > 0:
        shorter = (
            capacity(shape, cache, shape.longest, in_flight=batch.in_flight, tp=wanted.tp, element=element).tokens
            // 1024
            * 1024
        )
        if shorter >= 2048:
            return f"no: {wanted.problem}; set MAX_MODEL_LEN={shorter}"
    fitting = [row for row in rows if row.fits]
    same = next((row for row in fitting if row.tp == wanted.tp), None)
    if same is not None:
        return f"no: {wanted.problem}; take a checkpoint in {same.method} (or QUANTIZATION={same.method})"
    if fitting:
        return f"no: {wanted.problem}; it fits {fitting[0].tp} GPUs in {fitting[0].method} (TP_SIZE={fitting[0].tp})"
    return f"no: {wanted.problem}, and no row below fits: take a smaller model or larger GPUs"
