"""Refuses bodies that arrive too slowly, and requests on surplus connections.

The next chunk of a body may take `body_idle_seconds`, and the whole body that and the time that its bytes
take at the minimum rate. Only waiting counts, not the server's own work. Knows no route but the health
checks.
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
    """Middleware: refuses slow bodies (408) and surplus connections (503).

    Args:
        app: the application.
        idle_seconds: between two chunks of a body; also added to the time for its bytes.
        bytes_per_second: minimum rate.
    """

    def __init__(self, app: ASGIApp, idle_seconds: float, bytes_per_second: float) -> None:
        self._app = app
        self._idle_seconds = idle_seconds
        self._bytes_per_second = bytes_per_second

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a timeout in `receive`."""
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
            if whole:  # only the disconnect follows
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
