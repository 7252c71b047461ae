"""What vLLM refuses before it generates, in its own words and shapes."""

from __future__ import annotations

import json
from typing import Any

from tests.doubles.vllm_dialects import error_body
from tests.doubles.vllm_engine import chat_tokens, content_tokens

FASTAPI = "Bad Request"  # type of errors found before vLLM's own code; they have OpenAI's shape on every route
MAX_N_SEQUENCES = 16384  # VLLM_MAX_N_SEQUENCES


class Refusal(Exception):
    """A request that vLLM refuses."""

    def __init__(self, message: str, kind: str = "BadRequestError", code: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.body = error_body(message, kind, code, param)
        self.code = code


# What the double's own code meets in a body that vLLM's models would not have let in.
ILL_FORMED = (TypeError, AttributeError, ValueError, KeyError, IndexError, OverflowError, RecursionError)


def ill_formed() -> Refusal:
    """The complaint about such a body."""
    return Refusal("1 validation error:\n  Input should be valid", FASTAPI, 400, "body")


def missing(name: str) -> Refusal:
    """FastAPI's complaint about a field that is not there."""
    entry = {"type": "missing", "loc": f"body.{name}", "msg": "Field required", "input": "<dict>"}
    return Refusal(f"1 validation error:\n  {entry}", FASTAPI, 400, f"body.{name}")


def parse(path: str, content_type: str, body: bytes, models: tuple[str, ...]) -> dict[str, Any]:
    """The JSON body, checked as far as vLLM does before it generates. Raises `Refusal`."""
    if content_type != "application/json":
        raise Refusal("Validation error", FASTAPI)
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        place = f"body.{error.pos}" if isinstance(error, json.JSONDecodeError) else "body"
        raise Refusal("1 validation error:\n  JSON decode error", FASTAPI, 400, place) from None
    if not isinstance(parsed, dict):
        raise Refusal("1 validation error:\n  Input should be a valid dictionary", FASTAPI, 400, "body")
    model = parsed.get("model")
    if model and model not in models:
        raise Refusal(f"The model `{model}` does not exist.", "NotFoundError", 404, "model")
    if parsed.get("stream_options") and not parsed.get("stream"):
        raise Refusal("Stream options can only be defined when `stream=True`.", FASTAPI, 400, "stream_options")
    temperature = parsed.get("temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        raise Refusal("1 validation error:\n  Input should be a valid number", FASTAPI, 400, "body.temperature")
    if temperature is not None and temperature < 0:
        raise Refusal(f"temperature must be non-negative, got {temperature}.", param="temperature")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n"):
        value = parsed.get(name)
        if isinstance(value, float) and value.is_integer():
            value = parsed[name] = int(value)
        if value is not None and not isinstance(value, int):
            raise Refusal("1 validation error:\n  Input should be a valid integer", FASTAPI, 400, f"body.{name}")
        if value is not None and value < 1 and path == "/v1/messages":
            raise Refusal(f"1 validation error:\n  {name} must be positive", FASTAPI, 400, f"body.{name}")
        if value == 0 and name == "max_tokens" and parsed.get("echo") is True and path == "/v1/completions":
            continue
        if value is not None and value < 1:
            name = "max_tokens" if name.startswith("max_") else name
            raise Refusal(f"{name} must be at least 1, got {value}.", param=name)
    if (parsed.get("n") or 1) > MAX_N_SEQUENCES:
        raise Refusal(f"n must be at most {MAX_N_SEQUENCES}, got {parsed['n']}.", param="n")
    return parsed


def required(body: dict[str, Any], name: str) -> Any:
    """A field that vLLM insists on."""
    if body.get(name) is None:
        raise missing(name)
    return body[name]


def prompt_of(body: dict[str, Any]) -> Any:
    """The prompt of a completion, which vLLM itself misses, not FastAPI."""
    if body.get("prompt") is None:
        raise Refusal("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    return body["prompt"]


def response_tokens(value: Any) -> int:
    """Prompt tokens of a Responses input: a text is one user message."""
    return chat_tokens([{"content": value}] if isinstance(value, str) else value)


def message_tokens(body: dict[str, Any]) -> int:
    """Prompt tokens of a Messages body: `system` counts as its content."""
    return chat_tokens(required(body, "messages")) + content_tokens(body.get("system"))
