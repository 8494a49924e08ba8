"""Bodies that come too slowly, and requests on connections that are too many.

A body is waited for at most `body_idle_seconds` at a time, and in all not longer than that and the time
its bytes take at the least pace. Only waiting counts: a server that is slow itself blames nobody.
Knows no route but those that ask after the server's health.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.error_replies import reply_to
from server.api.middleware.observation import QUIET_PATHS
from server.errors import RequestTimeout, TooManyConnections
from server.http.scope import CROWDED


class SlowClients:
    """Middleware: refuse what comes too slowly (408), and whom there is no room for (503).

    Args:
        app: what is behind it.
        idle_seconds: between two pieces of a body; also what a body has besides the time for its bytes.
        bytes_per_second: the least pace.
    """

    def __init__(self, app: ASGIApp, idle_seconds: float, bytes_per_second: float) -> None:
        self._app = app
        self._idle_seconds = idle_seconds
        self._bytes_per_second = bytes_per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a clock in `receive`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        max_connections = scope.get("state", {}).get(CROWDED)
        if max_connections is not None and scope["path"] not in QUIET_PATHS:
            await reply_to(TooManyConnections(max_connections), scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._timed(receive), send)

    def _timed(self, receive: Receive) -> Receive:
        waited, received, whole = 0.0, 0, False

        async def timed() -> Message:
            nonlocal waited, received, whole
            if whole:  # what follows is only the news that the client went
                return await receive()
            allowed = self._idle_seconds + received / self._bytes_per_second - waited
            began = time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, min(self._idle_seconds, allowed))):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow(received, waited + time.monotonic() - began) from None
            waited += time.monotonic() - began
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            return message

        return timed

    def _too_slow(self, received: int, seconds: float) -> RequestTimeout:
        pace = f"{self._bytes_per_second / 1024:g} KiB a second"
        return RequestTimeout(
            f"the body came too slowly: {received} bytes in {seconds:.0f} seconds; expected {pace}, "
            f"and never a pause of {self._idle_seconds:g} seconds",
            field="body",
            expected=pace,
            came=f"{received} bytes in {seconds:.0f} seconds",
        )
