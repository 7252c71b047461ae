"""HTTP, no policy: relayed routes go to the pipeline as raw ASGI, every other route is Quart's."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from quart import Quart, Response, g, request
from werkzeug.exceptions import HTTPException

from gateway.client import Client, Headers, Receive, Scope, Send
from gateway.errors import (
    GatewayError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    RequestTooLarge,
    UnknownRoute,
)
from gateway.identifiers import fresh, ordered
from gateway.wire import ENDPOINTS

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from gateway.app import Gateway
    from gateway.call import Caller
    from gateway.exchange import Exchange
    from gateway.head import Head
    from gateway.wire import Endpoint

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{8,64}")
_STARTED = int(time.time())


def request_id(headers: Headers) -> str:
    """The caller's request id if it has a harmless form, else a new one (32 hex digits, usable as a trace id)."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return ordered()


class Api:
    """The ASGI application: `POST` on a relayed path bypasses Quart's request and response objects."""

    def __init__(self, gateway: Gateway) -> None:
        self._pipeline = gateway.pipeline
        self._addresses = gateway.addresses
        self.quart = routes(gateway)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI conversation."""
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = ENDPOINTS.get(scope["path"])
            if endpoint is not None:
                await self._run(Client(Headers(scope["headers"]), receive, send), endpoint, scope.get("client"))
                return
        await self.quart(scope, receive, send)  # type: ignore[arg-type]

    def relay(self, exchange: Exchange, head: Head, peer: tuple[str, int] | None) -> Awaitable[None] | None:
        """The same for our own connection protocol; None: Quart's."""
        endpoint = ENDPOINTS.get(head.path)
        if endpoint is None or head.method != "POST":
            return None
        return self._run(Client(Headers(head.headers), exchange.receive, exchange.send, exchange), endpoint, peer)

    def _run(self, client: Client, endpoint: Endpoint, peer: tuple[str, int] | None) -> Awaitable[None]:
        headers = client.headers
        ip = self._addresses.client(peer[0] if peer else "", headers.get(b"x-forwarded-for"))
        return self._pipeline.run(client, endpoint, request_id(headers), ip)


def routes(gateway: Gateway) -> Quart:
    """Every route that is not relayed."""
    app = Quart("gateway", static_folder=None)
    app.url_map.merge_slashes = False  # else `/v1//x` is answered by a redirect to whatever Host the caller sent
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024  # admin bodies are small; Quart's default is 16 MiB
    app.config["BODY_TIMEOUT"] = 30
    app.config["RESPONSE_TIMEOUT"] = 60  # nothing is streamed here

    @app.before_request
    async def _identify() -> None:
        g.request_id = request_id(Headers(request.scope["headers"]))

    @app.after_request
    async def _label(response: Response) -> Response:
        response.headers["x-request-id"] = g.get("request_id", "") or fresh()
        return response

    @app.errorhandler(GatewayError)
    async def _ours(error: GatewayError) -> Response:
        return Response(error.json(), error.status, error.headers(), content_type="application/json")

    @app.errorhandler(HTTPException)
    async def _http(error: HTTPException) -> Response:
        if error.code == 413:
            return await _ours(RequestTooLarge("The body is larger than 1 MiB."))
        if error.code in (404, 405):
            response = await _ours(UnknownRoute(f"There is no {request.method} {request.path[:200]} here."))
            if error.code == 405:
                response.status_code = 405
                response.headers["allow"] = ", ".join(sorted(getattr(error, "valid_methods", None) or ["POST"]))
            return response
        return await _ours(InvalidRequest(error.name))

    @app.errorhandler(Exception)
    async def _fault(error: Exception) -> Response:
        gateway.telemetry.fault_in_route(g.get("request_id", ""), error)
        return await _ours(InternalError("An internal error; the request id leads to it."))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> tuple[dict[str, Any], int, dict[str, str]]:
        causes = gateway.causes()
        return {"ready": not causes, "causes": causes}, 503 if causes else 200, {"retry-after": "2"} if causes else {}

    @app.get("/metrics")
    async def metrics() -> Response:
        gateway.refresh_metrics()
        body, content_type = gateway.metrics.render(request.headers.get("accept", ""))
        response = Response(body)
        response.headers["content-type"] = content_type
        return response

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        caller = gateway.auth.caller(Headers(request.scope["headers"]))
        return {"object": "list", "data": [_model(model) for model in gateway.registry.models() if _may(caller, model)]}

    @app.get("/v1/models/<path:name>")
    async def model(name: str) -> dict[str, Any]:
        caller = gateway.auth.caller(Headers(request.scope["headers"]))
        for known in gateway.registry.models():
            if known["id"] == name and _may(caller, known):
                return _model(known)
        raise ModelNotFound(f"The model '{name[:200]}' does not exist.", param="model")

    for blueprint in gateway.blueprints():
        app.register_blueprint(blueprint)
    for path in ENDPOINTS:  # other methods on relayed paths
        app.add_url_rule(path, f"not_{path}", _wrong_method,
                         methods=["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"],
                         provide_automatic_options=False)  # fmt: skip
    return app


async def _wrong_method() -> Response:
    error = UnknownRoute(f"{request.path} takes POST.")
    return Response(error.json(), 405, {"allow": "POST"}, content_type="application/json")


def _may(caller: Caller, model: dict[str, Any]) -> bool:
    return caller.models is None or model["id"] in caller.models


def _model(model: dict[str, Any]) -> dict[str, Any]:
    return {"object": "model", "created": _STARTED, "owned_by": "vllm", "root": model["id"], "parent": None, **model}
