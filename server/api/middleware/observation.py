"""Logs, counts and traces every request, and replies to unexpected errors.

One middleware, since all of these need the status and the end of a reply. Bodies are never recorded. Knows
no route by name, but for those that are polled.
"""

from __future__ import annotations

import time

import structlog
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_replies import CLIENT_GONE, reply_to
from server.api.middleware.headers import reply_headers
from server.api.middleware.work import work_facts
from server.http.scope import NO_ADAPTER
from server.services import Services
from server.telemetry.tracing import Reply, RequestSpan

log = structlog.get_logger(__name__)

QUIET_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
# Label of unknown paths: clients must not be able to create series.
NO_ROUTE = "none"


class Observation:
    """Middleware: logs, counts and traces each request, and answers errors that no handler expects.

    Health checks and scrapes are logged at debug level and have no span.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, then report the request, however it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        services: Services = scope["app"].state.services
        status: int | None = None
        began = time.monotonic()

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        services.metrics.reply_began()
        span = _begin_span(services, scope)
        try:
            try:
                await self._app(scope, receive, noting_status)
            except Exception as error:
                log.exception("request_failed", path=scope["path"], error=type(error).__name__)
                if status is not None:
                    raise
                await reply_to(error, scope["path"])(scope, receive, noting_status)
        finally:
            seconds = time.monotonic() - began
            method, route = scope["method"], route_of(scope)
            replied = CLIENT_GONE if status is None else status
            services.metrics.reply_ended(method, route, replied, seconds)
            if span is not None:
                span.end(_reply(scope, method, route, replied))
            _log_line(scope, status or 0, seconds)


def route_of(scope: Scope) -> str:
    """The template of the request's route, such as `/adapters/{name}`."""
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


def _log_line(scope: Scope, status: int, seconds: float) -> None:
    write = log.debug if scope["path"] in QUIET_PATHS else log.info
    headers = reply_headers(HTTPConnection(scope))
    key = scope["state"].get("key_id")
    write(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        milliseconds=round(seconds * 1000),
        request_id=headers["x-request-id"],
        adapter=headers["x-adapter-id"],
        version=headers["x-adapter-version"],
        **work_facts(scope),
        **({} if key is None else {"key": key}),
    )
