"""What a call is charged where the engine's word is not enough: a quota's bound, and answers that tell no usage."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.call import Call


def most(call: Call) -> int:
    """The tokens that `call` may cost where a day's quota stands behind its hold; 0: any number. Of media the hold is a
    guess, and their truth comes with the answer."""
    caller, hold, request = call.caller, call.hold, call.request
    if caller is None or hold is None or not (caller.limits.daily_tokens or caller.organisation_daily_tokens):
        return 0
    if request is None or request.media or request.endpoint.multipart:
        return 0
    return hold.tokens


def keep_to_hold(call: Call) -> None:
    """Never settle more than the day's quota has room for, whatever an engine reports that counts prompts otherwise
    than it said."""
    if tokens := most(call):
        call.usage.keep_to(tokens)


def count_most(call: Call, size: int) -> None:
    """Count the most that an answer of `size` bytes can have cost, because its engine does not say: never more than was
    held, and never nothing."""
    request = call.request
    assert request is not None
    if call.endpoint.metered:
        output = request.output_tokens
        call.usage.prompt = request.prompt_bound
        call.usage.completion = size if output is None or output > size else output
        if call.hold is not None:
            call.usage.keep_to(call.hold.tokens)
