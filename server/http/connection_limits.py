"""Limits on a request's line and headers, measured before they are parsed, and on the chunks of its body.

h11 limits only incomplete headers: headers that arrive in one chunk may have any size. This connection
measures the head of every request first, pipelined ones included. A chunk costs h11 twenty microseconds,
however small it is: a turn has a number of events, and a body a least mean size of chunks. It reports what
is wrong as an error of ours. Independent of how errors are written, of sockets and of clocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import h11
from starlette.exceptions import HTTPException

from server.config.settings import KIB, Settings
from server.errors import BodyTooLarge, HeadersTooLarge, UrlTooLong

# The request line also has a method and a version.
_BESIDE_THE_URL = 32
# Events that are parsed in one turn: half a millisecond of chunks. Most requests have three.
EVENTS_A_TURN = 32
# Of a body in more chunks than these, the mean size must reach `MIN_CHUNK_BYTES`. Clients that send what a
# JSON encoder yields have about five bytes a chunk.
FREE_CHUNKS = 10_000
MIN_CHUNK_BYTES = 4
_CRLF = b"\r\n"
_BLANK_LINE = re.compile(rb"\n\r?\n")
# The end of h11's messages, which quotes the input.
_WHAT_CAME = re.compile(r": b(?:ytearray\(b)?['\"].*", re.DOTALL)


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of one connection.

    Attributes:
        max_connections: open at once; more are refused.
        max_url_bytes: of a request's target, query included.
        max_header_bytes: of the request line and all headers.
        max_headers: how many.
        header_seconds: from the first byte of a request, or the start of a connection, to the end of
            its headers.
        keep_alive_seconds: between two requests.
        send_seconds: time for a client to read what was sent, or `bytes_per_second` of it.
        bytes_per_second: minimum rate of a client, in both directions.
    """

    max_connections: int
    max_url_bytes: int
    max_header_bytes: int
    max_headers: int
    header_seconds: float
    keep_alive_seconds: float
    send_seconds: float
    bytes_per_second: float

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """The limits of these settings."""
        return cls(
            max_connections=settings.max_connections,
            max_url_bytes=settings.max_url_kib * KIB,
            max_header_bytes=settings.max_header_kib * KIB,
            max_headers=settings.max_headers,
            header_seconds=settings.header_seconds,
            keep_alive_seconds=settings.keep_alive_seconds,
            send_seconds=settings.stream_send_seconds,
            bytes_per_second=settings.client_kib_per_second * KIB,
        )


class BoundedConnection(h11.Connection):
    """The server's side of HTTP; refuses requests whose head or number of chunks is too large.

    Attributes:
        refusal: why the last `RemoteProtocolError` was raised, and the requested path, or "" if
            unknown.
        is_held: whether the turn ended before everything that was received was parsed.
        has_begun: whether a request's line or headers have arrived in part.
        is_chunked: whether the body of the current request comes in chunks.
    """

    def __init__(self, limits: ConnectionLimits) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=limits.max_header_bytes)
        self._limits = limits
        self.refusal: tuple[Exception, str] = (_malformed("it cannot be read"), "")
        self.is_held = False
        self.has_begun = False
        self.is_chunked = False
        self._num_events_left = 0
        self._num_chunks = 0
        self._num_chunk_bytes = 0
        self._path = ""

    def begin_turn(self) -> None:
        """Let `next_event` parse `EVENTS_A_TURN` more events."""
        self._num_events_left = EVENTS_A_TURN
        self.is_held = False

    def next_event(self) -> Any:
        """The next event of the connection; `h11.NEED_DATA` also at the end of the turn.

        Raises:
            h11.RemoteProtocolError: not HTTP, a head that is too large, or too many chunks.
        """
        if not self._num_events_left:
            self.is_held = True
            return h11.NEED_DATA
        self._num_events_left -= 1
        head = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        if too_large := self._too_large(head):
            raise self._refused(too_large, path_of(head))
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            path = path_of(head) if head else self._path
            self.refusal = (_malformed(_WHAT_CAME.sub("", str(error))), path)
            raise
        self.has_begun = bool(head) and event is h11.NEED_DATA
        if isinstance(event, h11.Request):
            self._begin_request(event)
        elif isinstance(event, h11.Data) and self.is_chunked:
            self._count_chunk(event)
        return event

    def send(self, event: Any) -> Any:
        """The bytes of an event; the reply to a chunked body that has not ended says that it is the last.

        h11 does not learn of it: it would have the connection closed at once, and the reply could be lost.
        """
        data = super().send(event)
        is_unfinished = self.is_chunked and self.their_state is h11.SEND_BODY
        if not isinstance(event, h11.Response) or not is_unfinished:
            return data
        if any(name == b"connection" for name, _ in event.headers):
            return data
        return data.removesuffix(_CRLF) + b"connection: close" + 2 * _CRLF

    def _begin_request(self, request: h11.Request) -> None:
        self._path = request.target.partition(b"?")[0].decode("ascii", "replace")
        if too_many := self._too_many(request):
            raise self._refused(too_many, self._path)
        self.is_chunked = any(name == b"transfer-encoding" for name, _ in request.headers)
        self._num_chunks = self._num_chunk_bytes = 0

    def _count_chunk(self, data: h11.Data) -> None:
        self._num_chunks += data.chunk_start
        self._num_chunk_bytes += len(data.data)
        num_free = FREE_CHUNKS + self._num_chunk_bytes // MIN_CHUNK_BYTES
        if self._num_chunks > num_free:
            raise self._refused(_chunks_too_small(), self._path)

    def _refused(self, error: Exception, path: str) -> h11.RemoteProtocolError:
        self.refusal = (error, path)
        return h11.RemoteProtocolError(str(error))

    def _too_large(self, head: bytes) -> Exception | None:
        limits = self._limits
        if len(head) <= min(limits.max_url_bytes, limits.max_header_bytes):
            return None
        if b"\n" not in head[: limits.max_url_bytes + _BESIDE_THE_URL]:
            return _url_too_long(limits.max_url_bytes)
        if len(head) <= limits.max_header_bytes:
            return None
        # A body may follow, or the next request.
        if _BLANK_LINE.search(head, 0, limits.max_header_bytes) is None:
            return HeadersTooLarge(
                f"the request's headers are larger than {limits.max_header_bytes} bytes",
                field="headers",
                expected=f"at most {limits.max_header_bytes} bytes",
                came="more",
            )
        return None

    def _too_many(self, request: h11.Request) -> Exception | None:
        limits = self._limits
        if len(request.target) > limits.max_url_bytes:
            return _url_too_long(limits.max_url_bytes)
        if (count := len(request.headers)) > limits.max_headers:
            return HeadersTooLarge(
                f"the request has {count} headers; at most {limits.max_headers} are taken",
                field="headers",
                expected=f"at most {limits.max_headers} headers",
                came=str(count),
            )
        return None


def path_of(head: bytes) -> str:
    """The path in the first line of a request; "" if that line is incomplete."""
    line, end, _ = head[: 64 * KIB].partition(b"\n")
    words = line.split(b" ")
    if not end or len(words) < 2 or not words[1].startswith(b"/"):
        return ""
    return words[1].partition(b"?")[0].decode("ascii", "replace")


def _url_too_long(max_bytes: int) -> UrlTooLong:
    return UrlTooLong(
        f"the URL is longer than {max_bytes} bytes",
        field="url",
        expected=f"at most {max_bytes} bytes",
        came="more",
    )


def _chunks_too_small() -> BodyTooLarge:
    expected = f"chunks of {MIN_CHUNK_BYTES} bytes or more on average, after {FREE_CHUNKS}"
    return BodyTooLarge(
        f"the body comes in too many small chunks: expected {expected}; send larger chunks, or a "
        "content-length",
        field="body",
        expected=expected,
        came="smaller ones",
    )


def _malformed(why: str) -> HTTPException:
    return HTTPException(400, f"the request is not HTTP: {why}")
