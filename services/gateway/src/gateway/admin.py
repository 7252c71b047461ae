"""Keys, organisations and usage over HTTP: `/admin/…` with the admin key, `GET /v1/usage` with a caller's own."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from datetime import date
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import msgspec
from quart import Blueprint, Response, request

from gateway.errors import CallerError, GatewayError, InvalidApiKey, InvalidRequest, LedgerUnavailable, MissingApiKey
from gateway.keys import OrganisationFields, RotateFields, decode, decode_fields
from gateway.store import Store, StoreUnavailable, Unsure, accounts, reports

if TYPE_CHECKING:
    from gateway.addresses import Addresses
    from gateway.settings import Settings
    from gateway.stages.auth import Auth
    from gateway.stages.budget import Budget

ACTOR = "admin"


class AddressNotAllowed(CallerError):
    """The admin API is not open to this address (ADMIN_NETWORKS)."""

    status, code, type = 403, "address_not_allowed", "permission_error"


class _Headers:
    """Quart's headers as the auth stage reads them."""

    def get(self, name: bytes, /) -> bytes | None:
        value = request.headers.get(name.decode("ascii"))
        return None if value is None else value.encode("latin-1", "replace")


def blueprint(
    settings: Settings,
    store: Store,
    auth: Auth,
    budget: Budget,
    addresses: Addresses,
    queue: Callable[[], list[dict[str, Any]]],
) -> Blueprint:
    """The routes. `queue` is the capacity stage's list of who waits."""
    routes = Blueprint("admin", __name__)
    expected = settings.gateway_admin_key
    digest = sha256(expected.get_secret_value().encode()).digest() if expected is not None else None
    networks = settings.admin_network_list

    @routes.errorhandler(GatewayError)
    async def _render(error: GatewayError) -> Response:
        return Response(error.json(), error.status, error.headers(), content_type="application/json")

    @routes.errorhandler(StoreUnavailable)
    async def _unavailable(error: StoreUnavailable) -> Response:
        if isinstance(error, Unsure):
            return await _render(
                LedgerUnavailable("The database did not answer: whether the change was made is not known. Look first.")
            )
        return await _render(LedgerUnavailable("The database cannot be used at the moment; nothing was changed."))

    @routes.before_request
    async def _guard() -> None:
        if not request.path.startswith("/admin"):
            return
        forwarded = request.headers.get("x-forwarded-for")
        client = addresses.client(
            (request.scope.get("client") or ("", 0))[0], forwarded.encode("latin-1", "replace") if forwarded else None
        )
        if networks and not _inside(client, networks):
            raise AddressNotAllowed("The admin API is not open to this address.")
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise MissingApiKey("Send the admin key as 'Authorization: Bearer …'.")
        sent = sha256(secret.strip().encode("latin-1", "replace")).digest()
        if not hmac.compare_digest(sent, digest or bytes(32)) or digest is None:
            raise InvalidApiKey("This admin key is not valid.")

    @routes.post("/admin/keys")
    async def create() -> Response:
        values = decode_fields(await _body(), creating=True)
        key, secret = await store.change(lambda db: accounts.create(db, values, ACTOR))
        return _json({**key.public(), "secret": secret}, 201)

    @routes.get("/admin/keys")
    async def list_keys() -> Response:
        keys = await store.read(accounts.keys)
        return _json({"data": [key.public() for key in keys]})

    @routes.get("/admin/keys/<key_id>")
    async def show(key_id: str) -> Response:
        key = await store.read(lambda db: accounts.key(db, key_id))
        return _json({**key.public(), "usage": usage_of(budget, key_id)})

    @routes.patch("/admin/keys/<key_id>")
    async def change(key_id: str) -> Response:
        values = decode_fields(await _body())
        key = await store.change(lambda db: accounts.change(db, key_id, values, ACTOR))
        return _json(key.public())

    @routes.delete("/admin/keys/<key_id>")
    async def delete(key_id: str) -> Response:
        await store.change(lambda db: accounts.delete(db, key_id, ACTOR))
        response = Response(b"", 204)
        del response.headers["content-type"]  # nothing is sent that could have one
        return response

    @routes.post("/admin/keys/<key_id>/rotate")
    async def rotate(key_id: str) -> Response:
        grace = decode(await _body(), RotateFields).seconds()
        secret = await store.change(lambda db: accounts.rotate(db, key_id, grace, ACTOR))
        return _json({"id": key_id, "secret": secret})

    @routes.post("/admin/keys/<key_id>/disable")
    async def disable(key_id: str) -> Response:
        key = await store.change(lambda db: accounts.set_disabled(db, key_id, True, ACTOR))
        return _json(key.public())

    @routes.post("/admin/keys/<key_id>/enable")
    async def enable(key_id: str) -> Response:
        key = await store.change(lambda db: accounts.set_disabled(db, key_id, False, ACTOR))
        return _json(key.public())

    @routes.get("/admin/organisations")
    async def list_organisations() -> Response:
        return _json({"data": await store.read(accounts.organisations)})

    @routes.patch("/admin/organisations/<name>")
    async def change_organisation(name: str) -> Response:
        tokens = decode(await _body(), OrganisationFields).tokens()
        return _json(await store.change(lambda db: accounts.set_organisation(db, name, tokens, ACTOR)))

    @routes.get("/admin/usage")
    async def usage() -> Response:
        for name in request.args:
            if name not in ("from", "to", "group_by"):
                raise InvalidRequest(
                    f"There is no parameter '{name[:40]}'; use from, to and group_by.", param=name[:40]
                )
        group = request.args.get("group_by", "key")
        if group not in reports.GROUPS:
            raise InvalidRequest(f"'group_by' must be one of {', '.join(reports.GROUPS)}.", param="group_by")
        first, last = (_day(name) for name in ("from", "to"))
        return _json({"data": await store.read(lambda db: reports.usage(db, first, last, group))})

    @routes.get("/admin/audit")
    async def audit() -> Response:
        return _json({"data": await store.read(reports.audit)})

    @routes.get("/admin/queue")
    async def waiting() -> Response:
        return _json({"data": queue()})

    @routes.get("/v1/usage")
    async def own_usage() -> Response:
        caller = auth.caller(_Headers())
        answer = usage_of(budget, caller.key_id)
        answer["energy_joules"] = None
        if settings.gpu_exporter_url is None or not store.healthy:
            return _json(answer)  # what is in memory is told whatever the database does
        answer["energy_joules"] = await store.read(lambda db: reports.energy(db, caller.key_id, str(answer["day"])))
        return _json(answer)

    return routes


def usage_of(budget: Budget, key_id: str) -> dict[str, Any]:
    """What a key has used today, holds and has left; limits null where there are none. Times are Unix seconds."""
    caller = budget.caller(key_id)
    day = budget.days.of(budget.account(key_id))
    limit = caller.limits.daily_tokens if caller is not None else 0
    organisation = None
    if caller is not None and caller.organisation is not None:
        of = budget.days.of(budget.organisation(caller.organisation))
        quota = caller.organisation_daily_tokens
        organisation = {
            "name": caller.organisation,
            "used_tokens": of.used,
            "held_tokens": of.held,
            "limit_tokens": quota or None,
            "remaining_tokens": max(0, quota - of.used - of.held) if quota else None,
        }
    return {
        "key_id": key_id,
        "day": budget.days.today(),
        "used_tokens": day.used,
        "held_tokens": day.held,
        "limit_tokens": limit or None,
        "remaining_tokens": max(0, limit - day.used - day.held) if limit else None,
        "resets_at": int(budget.days.resets_at()),
        "requests": day.requests,
        "organisation": organisation,
    }


def _inside(address: str, networks: tuple[Any, ...]) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _day(name: str) -> str | None:
    value = request.args.get(name)
    if not value:
        return None
    try:
        return date.fromisoformat(value[:10] if "T" in value else value).isoformat()
    except ValueError:
        raise InvalidRequest(f"'{name}' must be a day like 2030-01-31.", param=name) from None


async def _body() -> bytes:
    data: bytes = await request.get_data(cache=False)  # type: ignore[assignment]
    return data


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, content_type="application/json")
