"""Every reply is counted, by the route that gave it. Knows no route by name."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import CLIENT_GONE
from server.api.services import Services

# A path that no route has: what strangers ask for must not make series.
NO_ROUTE = "none"


class Watched:
    """Middleware: tells the server's books of every request and of the end of its reply."""

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
        try:
            await self._app(scope, receive, watched)
        finally:
            seconds = time.monotonic() - began
            services.metrics.reply_ended(scope["method"], route_of(scope), status, seconds)


def route_of(scope: Scope) -> str:
    """The template of the route that took a request, such as `/adapters/{name}`."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else NO_ROUTE
