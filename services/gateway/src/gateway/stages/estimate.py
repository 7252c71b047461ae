"""What a call may cost, before anything is known: an upper bound for the day, a likely number for the minute.

The bound comes from the request (`prompt_bound`, `n`, what the caller asked for), the key's `max_tokens`,
`DEFAULT_OUTPUT_TOKENS` where the caller asked for nothing, and the model's length. No tokenizer is involved.
"""

from __future__ import annotations

import msgspec

from gateway.call import Caller
from gateway.errors import InvalidRequest
from gateway.wire import Request

FORMATS = ("float", "base64", None)
_LEAST_OUTPUT = 16  # a call that nobody bounded is not worth admitting for less


class Outputs(msgspec.Struct, frozen=True):
    """What the settings say about the length of answers, tokens."""

    default_output_tokens: int
    max_output_tokens: int


class Ask(msgspec.Struct):
    """Tokens a call wants. `most` and `least` bound what it may hold; `likely` is charged to the minute.

    `output` is the output limit for one choice that goes with `most`, None where the engine's own bound is enough.
    `prompt` is the bound of the prompt, `n` the choices; `generates` is False for embeddings and the like.
    """

    most: int
    least: int
    likely: int
    prompt: int
    n: int
    output: int | None
    generates: bool
    asked: int | None

    def limit_for(self, tokens: int) -> int | None:
        """The output limit of one choice that keeps the call within `tokens`; None: what the caller sent is right."""
        if not self.generates:
            return None
        limit = self.output
        if tokens < self.most:
            room = max(1, (tokens - self.prompt) // self.n)
            limit = room if limit is None or room < limit else limit
        return None if limit == self.asked else limit


def ask(request: Request, caller: Caller | None, bounds: Outputs, max_model_len: int | None) -> Ask:
    """Bound one request. Sizes are tokens. Raises `InvalidRequest` where the answer would tell no usage."""
    endpoint = request.endpoint
    n = max(1, request.n)
    prompt = request.prompt_bound
    whole = None
    if max_model_len:  # no sequence is longer than the model's context; the two of a pair may be read apart
        whole = max(n, request.prompts) * max_model_len * (2 if endpoint.pairs else 1)
    if endpoint.output_field is None or not endpoint.metered:
        if endpoint.name == "embeddings":
            _check_format(request)
        most = prompt if whole is None else min(prompt, whole)
        return Ask(most, most, min(request.prompt_estimate, most), most, n, None, False, None)
    if whole is not None and prompt > whole:
        prompt = whole
    asked = request.max_output if request.max_output is not None else endpoint.default_output
    output = asked
    for cap in (caller.limits.max_tokens if caller else 0, bounds.max_output_tokens):
        if cap and (output is None or output > cap):
            output = cap if output is not None or max_model_len is None else min(cap, max_model_len)
    limited = caller is not None and bool(
        caller.limits.daily_tokens or caller.limits.tokens_per_minute or caller.organisation_daily_tokens
    )
    defaulted = False
    if output is None and limited:
        output = bounds.default_output_tokens
        defaulted = True
    if asked is None and output is not None and max_model_len and prompt + output > max_model_len:
        # The engine refuses a limit that does not fit behind the prompt, and the prompt's length is only bounded:
        # its own end of the context bounds the call as well.
        fits = max_model_len - prompt
        output = fits if fits >= _LEAST_OUTPUT else None
    most = prompt + n * (bounds.default_output_tokens if output is None else output)
    if whole is not None and (output is None or most > whole):
        most = whole
    least = prompt + n * (1 if asked is not None else _LEAST_OUTPUT)
    expected = bounds.default_output_tokens // 8 if defaulted or output is None else output
    likely = request.prompt_estimate + n * expected
    if least > most:
        least = most
    if likely > most:
        likely = most
    return Ask(most, least, likely, prompt, n, output, True, asked)


def _check_format(request: Request) -> None:
    """Only forms whose answer is JSON: what vLLM does for `bytes` has its usage in a header, or nowhere."""
    raw = request.fields.get("encoding_format")
    if raw is not None and msgspec.json.decode(raw) not in FORMATS:
        raise InvalidRequest("'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
