"""What must happen when something is wrong: with the request, with the connection, with the engine behind."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.conformance.checks_stream import UNSUPPORTED, chat
from tests.conformance.endpoint import Endpoint, Failed, Skipped, Whole, expect

INTERNALS = re.compile(
    rb"Traceback|File \"|0x[0-9a-fA-F]{6,}|site-packages|/usr/|/home/|SECRET|aiohttp|uvicorn|<html", re.I
)
# Found by `--faults`, for which the engine behind the endpoint must be this repository's double.
FAULTS = {
    "die_after=3": "broken off (FIN)",
    "die_after=3,how=rst": "broken off (RST)",
    "die_after=3,how=clean": "ended without [DONE]",
    "error_after=2": "engine's own error event, then [DONE]",
    "garbage_after=3": "bytes that are no event",
}


def check_error(answer: Whole, *statuses: int) -> str:
    """An error in OpenAI's shape with one of `statuses`, without a word about the inside."""
    expect(answer.status in statuses, f"status {answer.status}")
    error = answer.json.get("error")
    expect(isinstance(error, dict), f"no error object: {answer.body[:80]!r}")
    expect(isinstance(error.get("message"), str) and error["message"], "no message")
    missing = {"type", "code", "param"} - set(error)
    expect(not missing, f"the error lacks {', '.join(sorted(missing))}")
    inside = INTERNALS.search(answer.body)
    expect(inside is None, f"tells about the inside: {inside and inside[0]!r}")
    return f"{answer.status} {error['code']}"


async def no_key(endpoint: Endpoint) -> str:
    """no key: 401 in OpenAI's shape"""
    answer = await endpoint.ask("/v1/chat/completions", chat(endpoint), key=None)
    if endpoint.key is None and answer.status == 200:
        raise Skipped("the endpoint asks for no key")
    return check_error(answer, 401)


async def wrong_key(endpoint: Endpoint) -> str:
    """a wrong key: 401 in OpenAI's shape, and nothing repeats the key"""
    if endpoint.key is None:
        raise Skipped("the endpoint asks for no key")
    answer = await endpoint.ask("/v1/models", key="sk-not-a-key-0123456789")
    expect(b"sk-not-a-key" not in answer.body, "the answer repeats the key")
    return check_error(answer, 401)


async def unknown_model(endpoint: Endpoint) -> str:
    """an unknown model: 404"""
    body = {**chat(endpoint), "model": "no-such-model"}
    return check_error(await endpoint.ask("/v1/chat/completions", body), 404)


async def unknown_model_stream(endpoint: Endpoint) -> str:
    """an unknown model with stream: still a 404 in JSON, not a stream"""
    body = {**chat(endpoint, stream=True), "model": "no-such-model"}
    return check_error(await endpoint.ask("/v1/chat/completions", body), 404)


async def bad_bodies(endpoint: Endpoint) -> str:
    """bodies that are no request: 400 for each, never 5xx"""
    bodies: list[Any] = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 5000, b'{"messages": 1e999}', {}]
    bodies += [{"model": endpoint.model}, chat(endpoint, messages="hello"), chat(endpoint, messages=[1])]
    bodies += [chat(endpoint, max_tokens=-1), chat(endpoint, temperature="hot"), chat(endpoint, n=0)]
    for body in bodies:
        try:
            check_error(await endpoint.ask("/v1/chat/completions", body), 400, 404, 422)
        except Failed as failure:
            raise Failed(f"{str(body)[:50]}: {failure}") from None
    return f"{len(bodies)} bodies"


async def greedy(endpoint: Endpoint) -> str:
    """n = 1,000,000: refused with 400"""
    return check_error(await endpoint.ask("/v1/chat/completions", chat(endpoint, n=1_000_000)), 400, 422)


async def unknown_routes(endpoint: Endpoint) -> str:
    """routes that do not exist, and wrong methods: 404 or 405 in OpenAI's shape"""
    for path, method in (("/v1/nothing", "POST"), ("/v1/chat/completions/x", "POST"), ("/v1/chat/completions", "GET")):
        try:
            check_error(await endpoint.ask(path, {} if method == "POST" else None, method=method), 404, 405)
        except Failed as failure:
            raise Failed(f"{method} {path}: {failure}") from None
    return ""


async def request_ids(endpoint: Endpoint) -> str:
    """x-request-id on answers and on errors, different each time"""
    answers = [await endpoint.ask("/v1/chat/completions", body) for body in (chat(endpoint, max_tokens=1), b"{", b"{")]
    ids = [answer.headers.get("x-request-id") for answer in answers]
    expect(all(ids), f"missing on {sum(not i for i in ids)} of 3 answers")
    expect(len(set(ids)) == 3, "not unique")
    return ""


async def large_body(endpoint: Endpoint) -> str:
    """a body announced with 4 GB: refused (413) or cut off before it is sent"""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {endpoint.host}\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers().items())
    answer = await endpoint.raw(f"{head}content-length: 4294967296\r\n\r\n".encode() + b"{" * 1000)
    expect(answer.startswith(b"HTTP/1.1 413"), f"answer: {answer[:40]!r}")
    return "413"


async def smuggling(endpoint: Endpoint) -> str:
    """ambiguous lengths (two Content-Length; Content-Length with chunked; bad chunk sizes): refused, never two answers"""
    body = json.dumps(chat(endpoint, max_tokens=1)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {endpoint.host}\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers().items())
    second = f"GET /v1/models HTTP/1.1\r\nhost: {endpoint.host}\r\n\r\n".encode()
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    attempts = {
        "two lengths": f"content-length: {len(body)}\r\ncontent-length: 5\r\n\r\n".encode() + body,
        "length and chunked": f"content-length: {len(chunked)}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        + chunked,
        "length with a sign": f"content-length: +{len(body)}\r\n\r\n".encode() + body,
        "chunk size that is none": b"transfer-encoding: chunked\r\n\r\nzz\r\n" + body + b"\r\n0\r\n\r\n",
        "unknown coding": b"transfer-encoding: xchunked\r\n\r\n" + chunked,
    }
    for name, rest in attempts.items():
        answer = await endpoint.raw(head.encode() + rest + second, seconds=3.0)
        statuses = re.findall(rb"HTTP/1\.1 (\d+)", answer)
        expect(len(statuses) <= 1, f"{name}: {len(statuses)} answers")
        expect(not statuses or statuses[0].startswith(b"4") or statuses[0] == b"501", f"{name}: {statuses}")
    return f"{len(attempts)} attempts"


async def leaving(endpoint: Endpoint) -> str:
    """a client that leaves in the middle of a stream: the next call is served as ever"""
    body = json.dumps(chat(endpoint, stream=True, max_tokens=200)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {endpoint.host}\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers().items())
    await endpoint.raw(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body, seconds=0.05)
    expect(
        (await endpoint.ask("/v1/chat/completions", chat(endpoint, max_tokens=1))).status == 200, "no answer after it"
    )
    return ""


async def broken_streams(endpoint: Endpoint) -> str:
    """engine fails in a stream: exactly one error event in the dialect, no clean end, nothing about the inside"""
    for fault, what in FAULTS.items():
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"):
            try:
                await broken_stream(endpoint, path, fault)
            except Failed as failure:
                raise Failed(f"{path}, {what}: {failure}") from None
    return f"{len(FAULTS)} faults in 4 dialects"


async def broken_stream(endpoint: Endpoint, path: str, fault: str) -> None:
    """One stream that breaks."""
    text = f"double:tokens=20,{fault}"
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/v1/completions": {"prompt": text, "max_tokens": 30},
        "/v1/messages": {"messages": [{"role": "user", "content": text}], "max_tokens": 30},
        "/v1/responses": {"input": text},
    }
    stream = await endpoint.stream(path, {"model": endpoint.model, "stream": True, **asked[path]})
    if stream.status in UNSUPPORTED:
        raise Skipped(f"{path}: status {stream.status}")
    expect(stream.status == 200, f"status {stream.status}")
    inside = INTERNALS.search(stream.raw)
    expect(inside is None, f"tells about the inside: {inside and inside[0]!r}")
    terminal = [e for e in stream.events if e.data == "[DONE]" or e.name in ("message_stop", "response.completed")]
    expect(not terminal, "a clean end after a failure")
    if path == "/v1/messages":
        errors = [e for e in stream.events if e.name == "error" and e.json["error"]["message"]]
    elif path == "/v1/responses":
        errors = [e for e in stream.events if e.name == "response.failed" and e.json["response"]["error"]["message"]]
    else:
        errors = [e for e in stream.events if "error" in e.json and e.json["error"]["message"]]
    expect(len(errors) == 1, f"{len(errors)} error events")
    expect(stream.events[-1] is errors[0], "something follows the error event")


async def failing_engine(endpoint: Endpoint) -> str:
    """engine fails before its first byte: 502, 503 or 504 in OpenAI's shape, nothing about the inside"""
    told = []
    for fault in ("status=500", "die=headers", "garbage=headers", "json=broken", "die_after=40"):
        messages = [{"role": "user", "content": f"double:{fault}"}]
        answer = await endpoint.ask("/v1/chat/completions", chat(endpoint, messages=messages))
        try:
            told.append(check_error(answer, 502, 503, 504).split()[0])
        except Failed as failure:
            raise Failed(f"{fault}: {failure}") from None
    return " ".join(told)


CHECKS = (
    no_key, wrong_key, unknown_model, unknown_model_stream, bad_bodies, greedy, unknown_routes, request_ids, large_body,
    smuggling, leaving,
)  # fmt: skip
WITH_FAULTS = (broken_streams, failing_engine)
