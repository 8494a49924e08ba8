"""One log line a request: what was asked for, how it ended, how long it took. Never a body."""

from __future__ import annotations

import time

import structlog
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.middleware.headers import reply_headers

log = structlog.get_logger(__name__)

QUIET_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})


class AccessLog:
    """Middleware; health checks and scrapes are logged at debug level only."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, then log the request however it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0
        began = time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            write = log.debug if scope["path"] in QUIET_PATHS else log.info
            headers = reply_headers(HTTPConnection(scope))
            key = scope["state"].get("key_id")
            write(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=round((time.monotonic() - began) * 1000),
                request_id=headers["x-request-id"],
                adapter=headers["x-adapter-id"],
                version=headers["x-adapter-version"],
                **({} if key is None else {"key": key}),
            )
