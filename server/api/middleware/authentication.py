"""Authentication and scope check for every route that is not public.

Plain ASGI, before routing. It looks at the method and at `scope["path"]`, never at what a route makes
of them; what `server.api.middleware.route_scopes` does not list is refused. It puts a `Caller` into the
request's state, with which routes get their `Services`; a server without keys has callers without one.
Of a key only its id is ever logged.
"""

from __future__ import annotations

import re

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.error_replies import reply_to
from server.api.middleware.route_hints import no_route
from server.api.middleware.route_scopes import PUBLIC, Rule, rule_of, rules_of
from server.errors import KeyRequired, RequestRefused, ScopeMissing
from server.services import Services
from server.store.caller import Caller
from server.store.key import Key

_BEARER = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_METRICS = "/metrics"
# RFC 6455: the endpoint refuses the connection by its policy.
_POLICY_VIOLATION = 1008


class Auth:
    """Middleware: authenticates a request, checks its scope and its rate.

    Args:
        app: the application.
        required: whether requests need a key.
        metrics_public: whether `/metrics` needs none.
    """

    def __init__(self, app: ASGIApp, *, required: bool, metrics_public: bool = False) -> None:
        self._app = app
        self._required = required
        self._metrics_public = metrics_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app on behalf of the key, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no such route, and no table of them
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
            return
        try:
            if not self._required:
                _check_end(scope["path"])
            key = await self._admit(scope) if self._required else None
        except (RequestRefused, HTTPException) as error:
            await reply_to(error, scope["path"])(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = Caller(key)
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Key | None:
        """The key; None where none is needed.

        Raises:
            KeyRequired: none that is good.
            RateLimited: one request too many.
            HTTPException: no such route, or no such method.
            ScopeMissing: the key may not.
        """
        method, path = scope["method"], scope["path"]
        rule = rule_of(method, path)
        if rule is None and PUBLIC in rules_of(path).values():
            raise no_route(path)
        if rule == PUBLIC or (rule is not None and path == _METRICS and self._metrics_public):
            return None
        services: Services = scope["app"].state.services
        text = _key_text(Headers(scope=scope))
        key = None if text is None else await services.need_keys().find(text)
        if key is None:
            raise KeyRequired
        scope.setdefault("state", {})["key_id"] = key.id
        services.quotas.count_request(key)
        if rule is None:
            raise no_route(path)
        if not key.may(rule):
            raise _scope_missing(rule)
        return key


def asks_for_keys(app: Starlette) -> bool:
    """Whether an app's requests need a key."""
    installed: list[tuple[object, bool]] = [
        (one.cls, bool(one.kwargs.get("required"))) for one in app.user_middleware
    ]
    return (Auth, True) in installed


def _check_end(path: str) -> None:
    # `$` of the routes' patterns also matches before a line break at the end; the table's do not.
    if path.endswith("\n"):
        raise HTTPException(404)


def _key_text(headers: Headers) -> str | None:
    """The one key that the headers give; None for none, or for several that differ."""
    given = set(headers.getlist("x-api-key"))
    for value in headers.getlist("authorization"):
        found = _BEARER.fullmatch(value)
        given.add(found.group(1) if found else "")
    return given.pop() if len(given) == 1 else None


def _scope_missing(rule: Rule) -> ScopeMissing:
    expected = " or ".join(sorted(rule))
    return ScopeMissing(
        f"the key may not do this: expected a key with the scope {expected}", expected=expected
    )
