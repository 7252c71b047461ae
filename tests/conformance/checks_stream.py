"""What a healthy answer must look like, whole and streamed, in each dialect."""

from __future__ import annotations

from typing import Any

from tests.conformance.endpoint import Endpoint, Failed, Skipped, Stream, expect

QUESTION = "Count from one to ten in words."
UNSUPPORTED = (400, 404, 405, 501)


def chat(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    """A small chat request."""
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": endpoint.model, "messages": messages, "max_tokens": 12, "temperature": 0, **fields}


async def streamed(endpoint: Endpoint, **fields: Any) -> Stream:
    """A chat stream that must begin well."""
    stream = await endpoint.stream("/v1/chat/completions", chat(endpoint, stream=True, **fields))
    expect(stream.status == 200, f"status {stream.status}")
    return stream


def check_usage(usage: Any) -> None:
    """Counts that add up."""
    expect(isinstance(usage, dict), f"usage is {usage!r}")
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    expect(usage["prompt_tokens"] > 0, "no prompt tokens")
    expect(usage["total_tokens"] == total, f"total_tokens {usage['total_tokens']} is not the sum {total}")


async def models(endpoint: Endpoint) -> str:
    """GET /v1/models: a list that has the model."""
    answer = await endpoint.ask("/v1/models")
    expect(answer.status == 200, f"status {answer.status}")
    names = [entry["id"] for entry in answer.json["data"]]
    expect(endpoint.model in names, f"{endpoint.model!r} is not among {names}")
    return f"{len(names)} models"


async def chat_json(endpoint: Endpoint) -> str:
    """chat: one JSON object with id, choices, finish_reason, and usage that adds up"""
    answer = await endpoint.ask("/v1/chat/completions", chat(endpoint))
    expect(answer.status == 200, f"status {answer.status}")
    expect(answer.headers.get("content-type", "").startswith("application/json"), "not application/json")
    body = answer.json
    expect(body["object"] == "chat.completion" and body["id"], "object or id")
    (choice,) = body["choices"]
    expect(choice["finish_reason"] in ("stop", "length"), f"finish_reason {choice['finish_reason']!r}")
    expect(choice["message"]["role"] == "assistant", "role")
    check_usage(body["usage"])
    return f"{body['usage']['completion_tokens']} tokens"


async def chat_limit(endpoint: Endpoint) -> str:
    """chat: max_tokens bounds the answer"""
    body = (await endpoint.ask("/v1/chat/completions", chat(endpoint, max_tokens=2))).json
    expect(body["usage"]["completion_tokens"] <= 2, f"{body['usage']['completion_tokens']} tokens for max_tokens 2")
    expect(body["choices"][0]["finish_reason"] == "length", "finish_reason is not 'length'")
    return "2 tokens"


async def stream_framing(endpoint: Endpoint) -> str:
    """chat stream: text/event-stream; JSON events; [DONE] exactly once, last; a proper end of the body"""
    stream = await streamed(endpoint)
    expect(stream.headers.get("content-type", "").startswith("text/event-stream"), "not text/event-stream")
    expect(stream.clean, "the body does not end properly")
    expect(stream.events, "no events")
    expect(stream.events[-1].data == "[DONE]", "the last event is not [DONE]")
    expect(sum(e.data == "[DONE]" for e in stream.events) == 1, "[DONE] more than once")
    expect(len({chunk["id"] for chunk in stream.chunks()}) == 1, "the id changes")
    expect(all(chunk["object"] == "chat.completion.chunk" for chunk in stream.chunks()), "object")
    return f"{len(stream.events)} events"


async def stream_choices(endpoint: Endpoint) -> str:
    """chat stream: the role first, then text, one finish_reason"""
    chunks = (await streamed(endpoint)).chunks()
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    expect(parts[0]["delta"].get("role") == "assistant", "the first delta has no role")
    expect("".join(p["delta"].get("content") or p["delta"].get("reasoning") or "" for p in parts), "no text")
    finished = [p["finish_reason"] for p in parts if p["finish_reason"]]
    expect(finished in (["stop"], ["length"]), f"finish_reasons {finished}")
    return str(finished[0])


async def stream_same(endpoint: Endpoint) -> str:
    """chat stream: usage counts the same as the whole answer"""
    whole = (await endpoint.ask("/v1/chat/completions", chat(endpoint))).json["usage"]
    chunks = (await streamed(endpoint, stream_options={"include_usage": True})).chunks()
    expect(chunks[-1]["usage"]["prompt_tokens"] == whole["prompt_tokens"], "prompt_tokens differ")
    return f"{whole['prompt_tokens']} prompt tokens"


async def stream_unasked(endpoint: Endpoint) -> str:
    """chat stream: no usage and no empty chunk unless asked for"""
    chunks = (await streamed(endpoint)).chunks()
    expect(not any(chunk.get("usage") for chunk in chunks), "usage was sent though nobody asked")
    expect(all(chunk["choices"] for chunk in chunks), "a chunk without choices")
    return ""


async def stream_usage(endpoint: Endpoint) -> str:
    """chat stream: include_usage gives one chunk with empty choices and usage, just before [DONE]"""
    *others, last = (await streamed(endpoint, stream_options={"include_usage": True})).chunks()
    expect(last["choices"] == [], "the last chunk has choices")
    check_usage(last["usage"])
    expect(not any(chunk.get("usage") for chunk in others), "usage on other chunks too")
    return f"{last['usage']['completion_tokens']} tokens"


async def stream_running(endpoint: Endpoint) -> str:
    """chat stream: continuous_usage_stats gives usage on every chunk, never falling (vLLM's extension)"""
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = await endpoint.stream("/v1/chat/completions", chat(endpoint, stream=True, stream_options=options))
    if stream.status in UNSUPPORTED:
        raise Skipped("not offered")
    chunks = stream.chunks()
    if not chunks[0].get("usage"):
        raise Skipped("not offered")
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    expect(counts == sorted(counts), f"the counts fall: {counts}")
    return f"up to {counts[-1]}"


async def stream_several(endpoint: Endpoint) -> str:
    """chat stream: with n=2 both choices begin and end once, and usage counts both"""
    stream = await endpoint.stream(
        "/v1/chat/completions",
        chat(endpoint, stream=True, n=2, temperature=1, stream_options={"include_usage": True}),
    )
    if stream.status in UNSUPPORTED:
        raise Skipped(f"n=2 is refused with {stream.status}")
    chunks = stream.chunks()
    finished = sorted(c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"])
    expect(finished == [0, 1], f"choices finished: {finished}")
    expect(chunks[-1]["usage"]["completion_tokens"] >= 2, "usage does not count both")
    return f"{chunks[-1]['usage']['completion_tokens']} tokens"


async def stream_pieces(endpoint: Endpoint) -> str:
    """chat stream: events arrive as they are made, not all at the end"""
    told = ""
    for _ in range(3):  # a wait before the first event looks like a buffer; only a buffer is there every time
        stream = await streamed(endpoint, max_tokens=64)
        if stream.seconds < 0.3 or len(stream.events) < 16:
            raise Skipped("the answer was too quick to tell")
        first, last = stream.events[0].at, stream.events[-1].at
        if last - first > 0.3 * stream.seconds:
            return f"first event after {first:.2f} of {stream.seconds:.2f} s"
        told = f"first event at {first:.2f} s, last at {last:.2f} s"
    raise Failed(told)


async def completions(endpoint: Endpoint) -> str:
    """completions: whole and streamed, the same counts"""
    body = {"model": endpoint.model, "prompt": QUESTION, "max_tokens": 6, "temperature": 0}
    whole = await endpoint.ask("/v1/completions", body)
    if whole.status in UNSUPPORTED:
        raise Skipped(f"status {whole.status}")
    expect(whole.json["object"] == "text_completion", "object")
    check_usage(whole.json["usage"])
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await endpoint.stream("/v1/completions", {**body, **options})
    expect(stream.events[-1].data == "[DONE]", "no [DONE]")
    expect(stream.chunks()[-1]["usage"] is not None, "no usage in the stream")
    return f"{whole.json['usage']['completion_tokens']} tokens"


async def messages(endpoint: Endpoint) -> str:
    """messages (Anthropic): message_start, deltas, message_delta with usage, message_stop; no [DONE]"""
    body = chat(endpoint, stream=True)
    stream = await endpoint.stream("/v1/messages", body)
    if stream.status in UNSUPPORTED:
        raise Skipped(f"status {stream.status}")
    names = [event.name for event in stream.events if event.name != "ping"]
    expect(names[0] == "message_start" and names[-1] == "message_stop", f"events {names[0]} … {names[-1]}")
    expect(all(event.json["type"] == event.name for event in stream.events), "type differs from the event's name")
    told = [event.json for event in stream.events if event.name == "message_delta"]
    expect(told and told[-1]["usage"]["output_tokens"] > 0, "no output_tokens in message_delta")
    return f"{told[-1]['usage']['output_tokens']} tokens"


async def responses(endpoint: Endpoint) -> str:
    """responses: response.created … response.completed with usage; sequence numbers without gaps; no [DONE]"""
    body = {"model": endpoint.model, "input": QUESTION, "max_output_tokens": 16, "stream": True}
    stream = await endpoint.stream("/v1/responses", body)
    if stream.status in UNSUPPORTED:
        raise Skipped(f"status {stream.status}")
    expect(stream.events[0].name == "response.created", f"first event {stream.events[0].name}")
    last = stream.events[-1]
    expect(last.name in ("response.completed", "response.incomplete"), f"last event {last.name}")
    numbers = [event.json["sequence_number"] for event in stream.events]
    expect(numbers == list(range(len(numbers))), "sequence numbers have gaps")
    used = last.json["response"]["usage"]
    expect(used["input_tokens"] + used["output_tokens"] == used["total_tokens"], "usage does not add up")
    return f"{used['output_tokens']} tokens"


async def embeddings(endpoint: Endpoint) -> str:
    """embeddings: one vector for each input, in order, with usage"""
    answer = await endpoint.ask("/v1/embeddings", {"model": endpoint.model, "input": ["one two", "three"]})
    if answer.status in UNSUPPORTED:
        raise Skipped(f"status {answer.status}")
    rows = answer.json["data"]
    expect([row["index"] for row in rows] == [0, 1], "indexes")
    expect(len({len(row["embedding"]) for row in rows}) == 1, "vectors differ in length")
    expect(answer.json["usage"]["prompt_tokens"] > 0, "no usage")
    return f"{len(rows[0]['embedding'])} dimensions"


CHECKS = (
    models, chat_json, chat_limit, stream_framing, stream_choices, stream_same, stream_unasked, stream_usage,
    stream_running, stream_several, stream_pieces, completions, messages, responses, embeddings,
)  # fmt: skip
