"""Every request is counted by the route that answered it, and has a span where traces are on.

Knows no route by name, but for those that nobody wants spans of.
"""

from __future__ import annotations

import time

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_replies import CLIENT_GONE
from server.api.middleware.access_log import QUIET_PATHS
from server.api.middleware.headers import reply_headers
from server.http.scope import NO_ADAPTER
from server.services import Services
from server.telemetry.tracing import Reply, RequestSpan

# A path that no route has: what strangers ask for must not make series.
NO_ROUTE = "none"


class Watched:
    """Middleware: tells the server's books, and its traces, of every request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, then count the reply however it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        services: Services = scope["app"].state.services
        status = CLIENT_GONE
        began = time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        services.metrics.reply_began()
        span = _begin_span(services, scope)
        try:
            await self._app(scope, receive, watched)
        finally:
            method, route = scope["method"], route_of(scope)
            services.metrics.reply_ended(method, route, status, time.monotonic() - began)
            if span is not None:
                span.end(_reply(scope, method, route, status))


def route_of(scope: Scope) -> str:
    """The template of the route that took a request, such as `/adapters/{name}`."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else NO_ROUTE


def _begin_span(services: Services, scope: Scope) -> RequestSpan | None:
    if services.tracing is None or scope["path"] in QUIET_PATHS:
        return None
    return services.tracing.begin(Headers(scope=scope))


def _reply(scope: Scope, method: str, route: str, status: int) -> Reply:
    headers = reply_headers(HTTPConnection(scope))
    adapter, version = headers["x-adapter-id"], headers["x-adapter-version"]
    return Reply(
        method=method,
        route=route,
        status=status,
        request_id=headers["x-request-id"],
        adapter=None if adapter == NO_ADAPTER else adapter,
        version=None if version == NO_ADAPTER else version,
    )
