"""The two dialects with named events: OpenAI's Responses and Anthropic's Messages, as vLLM 0.32 writes them."""

from __future__ import annotations

from typing import Any

from tests.doubles.vllm_dialects import Answer, Event, named

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens"}


class Responses(Answer):
    """`/v1/responses`. `response.created` and `response.in_progress` go out before prefill."""

    sequence = -1

    def event(self, name: str, **fields: Any) -> Event:
        self.sequence += 1
        return named(name, {**fields, "sequence_number": self.sequence, "type": name})

    def response(self, status: str) -> dict[str, Any]:
        ended = status == "completed"
        cut = ended and self.finish[0] == "length"
        output = [self.item("completed")] if ended else []
        body: dict[str, Any] = {"id": self.identity, "created_at": self.created}
        body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        body.update(instructions=None, metadata=None, model=self.model, object="response", output=output)
        body.update(parallel_tool_calls=True, temperature=1.0, tool_choice="auto", tools=[], top_p=1.0)
        body.update(background=False, max_output_tokens=self.request.get("max_output_tokens") or 4096)
        body.update(max_tool_calls=None, previous_response_id=None, prompt=None, reasoning=None, service_tier="auto")
        body["status"] = "incomplete" if cut else status
        body.update(text=None, top_logprobs=None, truncation="disabled", usage=None, user=None)
        if ended and self.lie != "none":
            used = self.used(sum(self.counts))
            body["usage"] = {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": 0,
                    "cache_write_tokens": 0,
                    "input_tokens_per_turn": [],
                    "cached_tokens_per_turn": [],
                },
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {
                    "reasoning_tokens": 0,
                    "tool_output_tokens": 0,
                    "output_tokens_per_turn": [],
                    "tool_output_tokens_per_turn": [],
                },
                "total_tokens": used["total_tokens"],
            }
        body.update(presence_penalty=0.0, frequency_penalty=0.0, kv_transfer_params=None, ec_transfer_params=None)
        body.update(input_messages=None, output_messages=None)
        return body

    def part(self) -> dict[str, Any]:
        return {"annotations": [], "text": self.texts[0], "type": "output_text", "logprobs": None}

    def item(self, status: str) -> dict[str, Any]:
        content = [self.part()] if status == "completed" else []
        item = {"id": "msg_0", "content": content, "role": "assistant", "status": status, "type": "message"}
        return {**item, "phase": None}

    def before_prefill(self) -> list[Event]:
        opening = self.response("in_progress")
        return [self.event(f"response.{name}", response=opening) for name in ("created", "in_progress")]

    def start(self) -> list[Event]:
        added = self.event("response.output_item.added", item=self.item("in_progress"), output_index=0)
        part = {**self.part(), "text": "", "logprobs": []}
        return [
            added,
            self.event("response.content_part.added", content_index=0, item_id="msg_0", output_index=0, part=part),
        ]

    def token_events(self, choice: int, text: str, finish: str | None) -> list[Event]:
        place = {"content_index": 0, "delta": text, "item_id": "msg_0", "logprobs": [], "output_index": 0}
        return [self.event("response.output_text.delta", **place)] if text else []

    def end(self) -> list[Event]:
        place = {"content_index": 0, "item_id": "msg_0", "output_index": 0}
        return [
            self.event("response.output_text.done", **place, logprobs=[], text=self.texts[0]),
            self.event("response.content_part.done", **place, part=self.part()),
            self.event("response.output_item.done", item=self.item("completed"), output_index=0),
        ]

    def terminal(self) -> list[Event]:
        return [self.event("response.completed", response=self.response("completed"))]

    def failure(self, message: str) -> list[Event] | None:
        return None  # the generator raises and uvicorn breaks the connection

    def body(self) -> dict[str, Any]:
        return self.response("completed")


class Messages(Answer):
    """`/v1/messages`. Usage stands in `message_start` and `message_delta`; nothing runs between."""

    opened = False

    def event(self, name: str, **fields: Any) -> Event:
        return named(name, {"type": name, **fields})

    def tokens(self, output: int) -> dict[str, int]:
        used = self.used(output)
        return {"input_tokens": used["prompt_tokens"], "output_tokens": used["completion_tokens"]}

    def message(self, **fields: Any) -> dict[str, Any]:
        head = {"id": self.identity, "type": "message", "role": "assistant"}
        return {**head, **fields}

    def start(self) -> list[Event]:
        told = {} if self.lie == "none" else {"usage": {**self.tokens(0), "output_tokens": 0}}
        message = self.message(content=[], model=self.model, stop_reason=None, stop_sequence=None, **told)
        return [self.event("message_start", message=message)]

    def token_events(self, choice: int, text: str, finish: str | None) -> list[Event]:
        if not text:
            return []
        events = []
        if not self.opened:
            self.opened = True
            block = {"type": "text", "text": ""}
            events.append(self.event("content_block_start", content_block=block, index=0))
        delta = {"type": "text_delta", "text": text}
        return [*events, self.event("content_block_delta", delta=delta, index=0)]

    def end(self) -> list[Event]:
        events = [self.event("content_block_stop", index=0)] if self.opened else []
        delta = {"stop_reason": STOP_REASONS[self.finish[0] or "stop"], "stop_sequence": None}
        told = {} if self.lie == "none" else {"usage": self.tokens(sum(self.counts))}
        return [*events, self.event("message_delta", delta=delta, **told)]

    def terminal(self) -> list[Event]:
        return [self.event("message_stop")]

    def failure(self, message: str) -> list[Event] | None:
        return [self.event("error", error={"type": "internal_error", "message": message})]

    def body(self) -> dict[str, Any]:
        told = {} if self.lie == "none" else {"usage": self.tokens(sum(self.counts))}
        content = [{"type": "text", "text": self.texts[0]}]
        reason = STOP_REASONS[self.finish[0] or "stop"]
        return self.message(content=content, model=self.model, stop_reason=reason, **told)
