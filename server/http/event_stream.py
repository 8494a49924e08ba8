"""Server-sent events, and clients that disconnect.

Frames end with LF LF. A disconnect cancels the request's work at once, whether the reply is a stream or
not: its row in the engine is free within two steps. Independent of routes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.http.scope import SEND_NOW, SendNow

ResultT = TypeVar("ResultT")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class ClientGone(Exception):
    """The client closed its connection before the reply."""


def compact(data: Any) -> str:
    """JSON without white space."""
    return _ENCODER.encode(data)


def event(data: Any) -> bytes:
    """One frame."""
    return f"data:{compact(data)}\n\n".encode()


def named_event(number: int, kind: str, data: Any) -> bytes:
    """One frame with an id, from which a client can resume after a lost connection."""
    return f"id: {number}\nevent: {kind}\ndata: {compact(data)}\n\n".encode()


def ping() -> bytes:
    """A comment, which clients ignore: it keeps an idle connection open."""
    return b":\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Await `work`, and cancel it when the client disconnects.

    The body must have been read: the next message of `receive` must be the disconnect.

    Raises:
        ClientGone: the client disconnected first; `work` was cancelled and has ended.
    """
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, disconnecting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        disconnecting.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def first_of(
    pieces: AsyncIterator[ResultT], receive: Receive, abort: Callable[[], object]
) -> ResultT:
    """The first of what a reply will stream: awaited before its status is sent, so that it is a real one.

    Args:
        pieces: what will be streamed.
        receive: as for `unless_gone`.
        abort: ends the work behind `pieces`; called if there is no first one.

    Raises:
        ClientGone: the client disconnected first.
        Exception: what `pieces` raised.
    """

    async def read() -> ResultT:
        return await anext(pieces)

    try:
        return await unless_gone(receive, read())
    except BaseException:
        abort()
        raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A reply that streams frames and closes their generator as soon as the client disconnects.

    Args:
        frames: an async generator of whole frames.
        on_end: called once when the reply ends, in any way and even if no frame was sent.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], on_end: Callable[[], None]) -> None:
        self.status_code = 200
        self.background = None
        self._frames = frames
        self._on_end = on_end
        self._gone = False
        # Proxies must not buffer or store frames.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send every frame, or stop when the client disconnects."""

        async def observed() -> Message:
            message = await receive()
            # Set here: a blocked `send` resumes before the cancellation reaches it.
            self._gone = message["type"] == "http.disconnect"
            return message

        try:
            await unless_gone(observed, self._send_all(send, _send_now(scope)))
        except ClientGone:
            return
        finally:
            self._on_end()

    async def _send_all(self, send: Send, send_now: SendNow) -> None:
        async with aclosing(self._frames) as frames:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for frame in frames:
                if not send_now(frame):
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
                if self._gone:
                    return
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _send_now(scope: Scope) -> SendNow:
    send_now: SendNow | None = scope.get("state", {}).get(SEND_NOW)
    if send_now is None or scope["method"] == "HEAD":
        return lambda _frame: False
    return send_now
