"""The headers that every reply carries, and the limit on what a request may bring.

Plain ASGI, so that it sees streams, refusals and unknown routes alike, and leaves `receive` free
for watching a client that goes away. Knows no route.
"""

from __future__ import annotations

import heapq
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.middleware.value_count import ValueCount
from server.errors import BodyTooLarge, WrongContentType
from server.http.scope import NO_ADAPTER

if TYPE_CHECKING:
    from server.generation.generator import Generation

# What may be echoed into a header and a log line without a second thought.
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Characters of `x-ignored-parameters`, and of each name in it.
_MAX_TOLD = 1_000
_MAX_NAME = 64
_STATE = "reply_headers"


class ReplyHeaders:
    """Middleware: `x-request-id`, `x-adapter-id`, `x-adapter-version`, on every reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a place for headers in the request's state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            "x-request-id": _request_id(Headers(scope=scope).get("x-request-id")),
            "x-adapter-id": NO_ADAPTER,
            "x-adapter-version": NO_ADAPTER,
        }
        scope.setdefault("state", {})[_STATE] = headers

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply = MutableHeaders(scope=message)
                for name, value in headers.items():
                    reply[name] = value
            await send(message)

        await self._app(scope, receive, with_headers)


class BodyLimit:
    """Middleware: refuse a body that is compressed, or larger than may be, while it arrives.

    A body may have `max_bytes`, and be made of `max_values`, see `ValueCount`.
    Uploads have a limit of their own, so paths in `exempt` are let through.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, max_values: int, exempt: frozenset[str]
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_values = max_values
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what is received."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        # Who sends no body may have `receive` watched while the reply streams.
        if scope["method"] != "GET" and encoding.strip().lower() not in ("", "identity"):
            await self._app(scope, _refuse_encoding, send)
            return
        if scope["path"] in self._exempt:
            await self._app(scope, receive, send)
            return
        received = 0
        values = ValueCount(self._max_values)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            data = message.get("body", b"")
            received += len(data)
            if received > self._max_bytes:
                raise body_too_large(self._max_bytes)
            values.feed(data)
            return message

        await self._app(scope, counted, send)


async def _refuse_encoding() -> Message:
    # Read where the body would be: a route that takes none does not mind.
    raise WrongContentType(
        "the body has a content-encoding; send it as it is, bodies are not inflated here",
        field="content-encoding",
        expected="identity",
        came="another",
    )


def body_too_large(max_bytes: int) -> BodyTooLarge:
    """The refusal of a body over its limit."""
    return BodyTooLarge(
        f"the body is larger than {max_bytes} bytes",
        field="body",
        expected=f"at most {max_bytes} bytes",
        came="more",
    )


def set_headers(connection: HTTPConnection, headers: Mapping[str, str]) -> None:
    """Add headers to the reply of this request; the values must be ASCII."""
    reply_headers(connection).update(headers)


def note_ignored(connection: HTTPConnection, names: Iterable[str]) -> None:
    """Say in `x-ignored-parameters` which fields of the body had no effect."""
    # No more of them than there is room for: a body may have a hundred thousand, of any length.
    cut = heapq.nsmallest(_MAX_TOLD, (name[:_MAX_NAME] for name in names))
    printable = ("".join(c if c.isascii() and c.isalnum() else "_" for c in name) for name in cut)
    if told := ", ".join(printable)[:_MAX_TOLD]:
        set_headers(connection, {"x-ignored-parameters": told})


def reply_headers(connection: HTTPConnection) -> dict[str, str]:
    """The headers that this request's reply will carry, as far as they are known."""
    reply: dict[str, str] = getattr(connection.state, _STATE)
    return reply


def timing_headers(*generations: Generation) -> dict[str, str]:
    """`x-queue-time` and `x-time-to-first-token`, in milliseconds as TGI's are.

    Of several generations the one whose first token came first; both times begin when the engine was
    asked. Nothing is told that is not known yet.
    """
    begun = [one for one in generations if one.first_token_seconds is not None]
    if not begun:
        return {}
    first = min(begun, key=lambda one: one.first_token_seconds or 0.0)
    known = {
        "x-queue-time": first.queue_seconds,
        "x-time-to-first-token": first.first_token_seconds,
    }
    return {name: str(round(s * 1000)) for name, s in known.items() if s is not None}


def _request_id(given: str | None) -> str:
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
