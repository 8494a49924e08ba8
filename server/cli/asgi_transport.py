"""httpx requests answered by an ASGI application in this process, from any thread.

The application runs on an event loop in a thread of its own. Bodies of replies are streamed, which
`httpx.ASGITransport` does not do: it waits for the last byte. Knows no route.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import httpx
from anyio.from_thread import start_blocking_portal
from starlette.types import ASGIApp, Message, Scope

ResultT = TypeVar("ResultT")

# Messages of a reply that wait to be read, before the application has to.
_AHEAD = 16


class ASGITransport(httpx.BaseTransport):
    """Hands requests to an ASGI application. What the application raises is raised here.

    Args:
        app: called once a request, without a lifespan.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()
        self._is_closed = False

    def call(self, function: Callable[..., Awaitable[ResultT]], *arguments: object) -> ResultT:
        """Await a function on the application's event loop."""
        return self._portal.call(function, *arguments)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the reply, as soon as it has begun.

        Raises:
            ReadTimeout: the application sends nothing for longer than the request allows.
        """
        seconds = request.extensions.get("timeout", {}).get("read")
        reply = _Reply(self.call, request, seconds)
        reply.running = self._portal.start_task_soon(reply.run, self._app, request.read())
        start = reply.receive()
        return httpx.Response(start["status"], headers=start["headers"], stream=reply)

    def close(self) -> None:
        """Cancel what runs, and end the event loop."""
        if not self._is_closed:
            self._is_closed = True
            self._portal.call(self._portal.stop, True)
            self._portal_context.__exit__(None, None, None)


class _Reply(httpx.SyncByteStream):
    """One reply while it is sent on the loop and read in another thread."""

    running: Future[None]

    def __init__(
        self,
        call: Callable[[Callable[[], Awaitable[Message | None]]], Message | None],
        request: httpx.Request,
        seconds: float | None,
    ) -> None:
        self._call = call
        self._request = request
        self._seconds = seconds
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)

    async def run(self, app: ASGIApp, body: bytes) -> None:
        """Run the application; None ends its messages, however it ended."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            return await asyncio.Future[Message]()  # a caller that goes cancels all of this

        try:
            await app(_scope(self._request), receive, self._messages.put)
        finally:
            await self._messages.put(None)

    def receive(self) -> Message:
        """The next message; an empty last part of a body where the application sent no more."""
        message = self._call(self._next)
        if message is None:
            self.running.result()  # raises what the application raised
            return {"type": "http.response.body", "body": b"", "more_body": False}
        return message

    def __iter__(self) -> Iterator[bytes]:
        """The body, part by part."""
        more = True
        while more:
            message = self.receive()
            yield message.get("body", b"")
            more = message.get("more_body", False)

    def close(self) -> None:
        """Cancel the application's work for this request, if it has not ended."""
        self.running.cancel()

    async def _next(self) -> Message | None:
        try:
            async with asyncio.timeout(self._seconds):
                return await self._messages.get()
        except TimeoutError as error:
            raise httpx.ReadTimeout(
                "the application sent nothing", request=self._request
            ) from error


def _scope(request: httpx.Request) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": (request.url.host, request.url.port),
        "client": None,
        "state": {},
    }
