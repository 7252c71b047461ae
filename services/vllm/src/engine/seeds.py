"""Keeps a call with a `seed` from ending vLLM on a CPU.

When a prompt is computed in parts beside another call's tokens, vLLM drops what it sampled before the last part and
turns the call's random generator back by an offset, which a CPU's generator does not have: `RuntimeError: CPU Generator
does not use offset` ends the engine, and with it everybody's answers (vLLM 0.32; others who run it without CUDA had to
mend the same). A copy of this file lies on vLLM's PYTHONPATH as `engine_seeds`, announced as a general plugin.
On GPUs it does nothing.
"""

from __future__ import annotations

from typing import Any

ENTRY_POINT = "[vllm.general_plugins]\nengine_seeds = engine_seeds:register\n"


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        mend(CPUModelRunner)


def mend(runner: Any) -> None:
    """Let the generators of dropped samples begin anew, where vLLM would turn them back. Twice does no harm."""
    original = runner._bookkeeping_sync
    if getattr(original, "mended", False):
        return

    def bookkeeping(self: Any, *args: Any, **more: Any) -> Any:
        batch = self.input_batch
        dropped = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        hidden = {number: batch.generators.pop(number) for number in map(int, dropped) if number in batch.generators}
        for generator in hidden.values():
            generator.manual_seed(generator.initial_seed())  # exact, unless the call was preempted: then it draws anew
        try:
            return original(self, *args, **more)
        finally:
            batch.generators.update(hidden)

    bookkeeping.mended = True  # type: ignore[attr-defined]
    runner._bookkeeping_sync = bookkeeping
