"""The headers of every reply, and the limit on request bodies.

Plain ASGI, so that it covers streams, refusals and unknown routes, and leaves `receive` free to detect a
disconnect. Independent of routes.
"""

from __future__ import annotations

import heapq
import re
import uuid
from collections.abc import Iterable, Mapping

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.field_errors import close_to
from server.api.middleware.value_count import ValueCount
from server.errors import BodyTooLarge, WrongContentType
from server.http.scope import NO_ADAPTER

log = structlog.get_logger(__name__)

# Request ids that are safe in a header and a log line.
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Characters of `x-ignored-parameters`, and of each name in it.
_MAX_IGNORED = 1_000
_MAX_NAME = 64
# Names of which `x-did-you-mean` speaks, and how alike they must be: a field of another server that has no
# effect here is no mistake.
_MAX_MEANT = 8
_SURE = 0.85
_STATE = "reply_headers"
# Headers that a web page of an allowed origin may read, besides those that browsers show anyway.
PAGE_HEADERS = (
    "location",
    "retry-after",
    "x-adapter-id",
    "x-adapter-version",
    "x-did-you-mean",
    "x-ignored-parameters",
    "x-queue-time",
    "x-request-id",
    "x-time-to-first-token",
)


class ReplyHeaders:
    """Middleware: `x-request-id`, `x-adapter-id`, `x-adapter-version`, on every reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app with a dictionary of reply headers in the request's state."""
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
    """Middleware: refuses compressed bodies and bodies over their limits, while they arrive.

    A body may have `max_bytes` and `max_values`, see `ValueCount`. Paths in `exempt` (uploads) have
    limits of their own.
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
        # A GET may have its `receive` observed while the reply streams.
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
    # Raised when the body is read: a route that reads none is not affected.
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


def note_ignored(
    connection: HTTPConnection, names: Iterable[str], known: Mapping[str, str] | None = None
) -> None:
    """List in `x-ignored-parameters` the fields of the body that had no effect.

    Args:
        connection: of the request.
        names: the fields.
        known: fields that the route has, and where they belong; `x-did-you-mean` has those that were
            probably meant.
    """
    # Only as many as fit: a body may have a hundred thousand, of any length.
    cut = heapq.nsmallest(_MAX_IGNORED, (name[:_MAX_NAME] for name in names))
    printable = ["".join(c if c.isascii() and c.isalnum() else "_" for c in name) for name in cut]
    if ignored := ", ".join(printable)[:_MAX_IGNORED]:
        set_headers(connection, {"x-ignored-parameters": ignored})
    meant = [
        f"{name}: {known[close]}"
        for name in printable[:_MAX_MEANT]
        if known and (close := close_to(name, known, _SURE))
    ]
    if meant:
        hint = ", ".join(meant)
        set_headers(connection, {"x-did-you-mean": hint})
        path, request_id = connection.scope["path"], reply_headers(connection)["x-request-id"]
        log.warning("parameters_ignored", path=path, did_you_mean=hint, request_id=request_id)


def reply_headers(connection: HTTPConnection) -> dict[str, str]:
    """The headers set so far for this request's reply."""
    reply: dict[str, str] = getattr(connection.state, _STATE)
    return reply


def _request_id(given: str | None) -> str:
    if given is not None and _SANE_REQUEST_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex
