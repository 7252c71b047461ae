"""vLLM 0.32's answers in its four generating dialects: events of a stream, and whole bodies.

Field order, nulls and framing follow vLLM's own serialisation (`model_dump_json`, with `exclude_unset` on chunks):
a proxy that edits bytes meets the same bytes here.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from typing import Any

Event = bytes


def dumps(value: Any) -> str:
    """Compact JSON with unescaped UTF-8, as pydantic and Starlette write it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def data(value: Any) -> Event:
    """A nameless event."""
    return f"data: {dumps(value)}\n\n".encode()


def named(name: str, value: Any) -> Event:
    """A named event."""
    return f"event: {name}\ndata: {dumps(value)}\n\n".encode()


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """vLLM's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """Usage in the order of vLLM's fields."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}


class Answer(ABC):
    """One generating answer. `counts` are the generated tokens of each choice, as reported to the caller."""

    fingerprint: str | None = None  # as with --fingerprint-mode none

    def __init__(
        self, identity: str, model: str, body: dict[str, Any], prompt: int, choices: int, lie: str | None
    ) -> None:
        self.identity = identity
        self.model = model
        self.request = body
        self.prompt = prompt
        self.choices = choices
        self.lie = lie
        self.created = int(time.time())
        self.counts = [0] * choices
        self.texts = [""] * choices
        self.finish: list[str | None] = [None] * choices
        options = body.get("stream_options") or {}
        self.final_usage = bool(options.get("include_usage")) and lie != "none"
        self.running_usage = self.final_usage and bool(options.get("continuous_usage_stats"))

    def used(self, completion: int) -> dict[str, Any]:
        """Usage as told, which a lying engine exaggerates."""
        return usage(self.prompt, completion + (1_000_000 if self.lie == "wrong" else 0))

    def stamp(self) -> dict[str, Any]:
        """The fingerprint on a last chunk, if there is one."""
        return {} if self.fingerprint is None else {"system_fingerprint": self.fingerprint}

    def before_prefill(self) -> list[Event]:
        """Events sent at once."""
        return []

    def start(self) -> list[Event]:
        """Events sent when prefill is done."""
        return []

    def token(self, choice: int, text: str, finish: str | None) -> list[Event]:
        """Events of one token."""
        self.counts[choice] += 1
        self.texts[choice] += text
        self.finish[choice] = finish
        return self.token_events(choice, text, finish)

    @abstractmethod
    def token_events(self, choice: int, text: str, finish: str | None) -> list[Event]:
        """What a token looks like in this dialect."""

    def end(self) -> list[Event]:
        """Events after the last token, without `terminal`."""
        return []

    def terminal(self) -> list[Event]:
        """The event after which nothing may come."""
        return [b"data: [DONE]\n\n"]

    def failure(self, message: str) -> list[Event] | None:
        """What vLLM sends when the engine fails in the middle; None: it breaks the connection."""
        return [data(error_body(message, "InternalServerError", 500)), b"data: [DONE]\n\n"]

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer of a request without `stream`."""


class Chat(Answer):
    """`/v1/chat/completions`."""

    @property
    def tool(self) -> str | None:
        """The tool that this answer calls."""
        tools = self.request.get("tools")
        return tools[0]["function"]["name"] if tools and self.request.get("tool_choice") != "none" else None

    def chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None, **more: Any) -> Event:
        chunk: dict[str, Any] = {
            "id": self.identity,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if used is not None:
            chunk["usage"] = used
        return data({**chunk, **more})

    def running(self, completion: int) -> dict[str, Any] | None:
        return {**self.used(completion), "completion_tokens_details": None} if self.running_usage else None

    def start(self) -> list[Event]:
        return [
            self.chunk(
                [{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}],
                self.running(0),
                prompt_token_ids=None,
                prompt_text=None,
            )
            for i in range(self.choices)
        ]

    def logprobs(self, text: str) -> dict[str, Any] | None:
        if not self.request.get("logprobs"):
            return None
        entry = {"token": text, "logprob": -0.25, "bytes": list(text.encode())}
        top = [entry] * int(self.request.get("top_logprobs") or 0)
        return {"content": [{**entry, "top_logprobs": top}]}

    def arguments(self, choice: int, text: str, finish: str | None) -> str:
        """The piece of a tool call's arguments that this token is: one JSON object over the whole answer."""
        if finish is not None:
            return '"}' if self.counts[choice] > 1 else "{}"
        return '{"text": "' if self.counts[choice] == 1 else text.strip().replace('"', "").replace("\\", "")

    def token_events(self, choice: int, text: str, finish: str | None) -> list[Event]:
        delta: dict[str, Any] = {"content": text}
        if self.tool:
            finish = "tool_calls" if finish == "stop" else finish
            call: dict[str, Any] = {"index": 0, "function": {"arguments": self.arguments(choice, text, finish)}}
            if self.counts[choice] == 1:
                call = {"id": f"chatcmpl-tool-{choice}", "type": "function", **call}
                call["function"] = {"name": self.tool, **call["function"]}
            delta = {"tool_calls": [call]}
        part: dict[str, Any] = {
            "index": choice,
            "delta": delta,
            "logprobs": self.logprobs(text),
            "finish_reason": finish,
        }
        if finish is not None:
            part["stop_reason"] = None
        part["token_ids"] = None
        print_here = {} if finish is None or self.final_usage else self.stamp()
        return [self.chunk([part], self.running(self.counts[choice]), **print_here)]

    def end(self) -> list[Event]:
        if not self.final_usage:
            return []
        return [self.chunk([], self.used(sum(self.counts)), **self.stamp())]

    def body(self) -> dict[str, Any]:
        choices = []
        for i in range(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": self.texts[i]}
            message.update(refusal=None, annotations=None, audio=None, function_call=None)
            finish = self.finish[i]
            if self.tool:
                message["content"] = None
                call = {"name": self.tool, "arguments": dumps({"text": self.texts[i]})}
                message["tool_calls"] = [{"id": f"chatcmpl-tool-{i}", "type": "function", "function": call}]
                finish = "tool_calls" if finish == "stop" else finish
            message["reasoning"] = None
            choices.append(
                {
                    "index": i,
                    "message": message,
                    "logprobs": self.logprobs(self.texts[i]),
                    "finish_reason": finish,
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                }
            )
        body: dict[str, Any] = {"id": self.identity, "object": "chat.completion", "created": self.created}
        body.update(model=self.model, choices=choices, service_tier=None, system_fingerprint=self.fingerprint)
        if self.lie != "none":
            details = {"prompt_tokens_details": None, "completion_tokens_details": None}
            body["usage"] = {**self.used(sum(self.counts)), **details}
        body.update(prompt_logprobs=None, prompt_token_ids=None, prompt_text=None, kv_transfer_params=None)
        body.update(ec_transfer_params=None, metrics=None)
        return body


class Completion(Answer):
    """`/v1/completions`; `choices` counts all prompts' choices."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.offsets = [0] * self.choices
        self.said: list[list[str]] = [[] for _ in range(self.choices)]

    def logprobs(self, texts: list[str], offset: int) -> dict[str, Any] | None:
        if self.request.get("logprobs") is None:
            return None
        offsets = [offset + sum(map(len, texts[:i])) for i in range(len(texts))]
        top = [{text: -0.25} for text in texts]
        return {"text_offset": offsets, "token_logprobs": [-0.25] * len(texts), "tokens": texts, "top_logprobs": top}

    def chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None, **more: Any) -> Event:
        chunk: dict[str, Any] = {"id": self.identity, "object": "text_completion", "created": self.created}
        chunk.update(model=self.model, choices=choices)
        if used is not None:
            chunk["usage"] = used
        return data({**chunk, **more})

    def token_events(self, choice: int, text: str, finish: str | None) -> list[Event]:
        told = self.logprobs([text], self.offsets[choice])
        self.offsets[choice] += len(text)
        self.said[choice].append(text)
        part = {"index": choice, "text": text, "logprobs": told, "finish_reason": finish, "stop_reason": None}
        part.update(prompt_token_ids=None, token_ids=None)
        used = self.used(self.counts[choice]) if self.running_usage else None
        print_here = {} if finish is None or self.final_usage else self.stamp()
        return [self.chunk([part], used, **print_here)]

    def end(self) -> list[Event]:
        if not self.final_usage:
            return []
        return [self.chunk([], self.used(sum(self.counts)), **self.stamp())]

    def body(self) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": self.texts[i],
                "logprobs": self.logprobs(self.said[i], 0),
                "finish_reason": self.finish[i],
                "stop_reason": None,
                "token_ids": None,
                "prompt_logprobs": None,
                "prompt_token_ids": None,
                "routed_experts": None,
            }
            for i in range(self.choices)
        ]
        body: dict[str, Any] = {"id": self.identity, "object": "text_completion", "created": self.created}
        body.update(model=self.model, choices=choices, service_tier=None, system_fingerprint=self.fingerprint)
        if self.lie != "none":
            details = {"prompt_tokens_details": None, "completion_tokens_details": None}
            body["usage"] = {**self.used(sum(self.counts)), **details}
        body.update(kv_transfer_params=None, ec_transfer_params=None, metrics=None)
        return body
