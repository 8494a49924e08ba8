"""How the server listens: uvicorn's protocol over h11, with a clock and a limit on every side.

uvicorn waits for ever for a request's headers, for the rest of a body that the app does not read, and
for a client that reads nothing. Here each of these ends:

    headers    are whole in `header_seconds`, or 408
    a body     that the app did not want is read and dropped for `header_seconds`, then cut
    a reader   takes what was sent in `send_seconds`, or is cut
    connection above `max_connections`: an idle one makes room; else 503

How slowly a body may come that the app does want, `server.api.middleware.slow_clients` decides. h11 and not
httptools: its bounds can be set, and it is Python that can be read. Knows no route.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import h11
import structlog
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.config.settings import Settings
from server.errors import RequestTimeout, TooManyConnections
from server.http.connection_limits import BoundedConnection, ConnectionLimits, path_of
from server.http.descriptors import room_for
from server.http.scope import CROWDED, NO_ADAPTER, SEND_NOW, RefusalWriter

log = structlog.get_logger(__name__)

# Of one connection, in the kernel, which then holds about 100 KB for a client that does not read. Left
# alone it would grow to megabytes.
SEND_BUFFER_BYTES = 64 * 1024
# Above `max_connections`: who only asks after the server's health must be answered even then.
NUM_RESERVED = 32
_CROWDED_SECONDS = 1.0
# What a refused client is given to read why; hanging up at once could take it away from it.
_LAST_WORDS_SECONDS = 1.0

CutHook = Callable[[str], None]


class BoundedProtocol(H11Protocol):
    """One connection.

    Args:
        limits: what it may take.
        write_refusal: writes the body of a reply to a request that the app never sees.
        on_cut: called with a word when it is cut, or refused before the app hears of it.
        options: uvicorn's own.
    """

    conn: BoundedConnection

    def __init__(
        self,
        limits: ConnectionLimits,
        write_refusal: RefusalWriter,
        on_cut: CutHook,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conn = BoundedConnection(limits)
        # uvicorn says int, and hands it to a clock.
        self.timeout_keep_alive = limits.keep_alive_seconds  # type: ignore[assignment]
        self._limits = limits
        self._write_refusal = write_refusal
        self._on_cut = on_cut
        self._header_seconds = limits.header_seconds
        self._headers = _Deadline(self.loop)
        self._unwanted = _Deadline(self.loop)
        self._unread = _Deadline(self.loop)
        self._num_unsent = 0
        self._hung_up = False
        # The request whose reply is known to go out in chunks.
        self._chunked: object = None

    # --- the life of a connection --------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, or refuse it where there are too many."""
        super().connection_made(transport)
        self._frames = _Frames(self)
        self.app_state = {**self.app_state, SEND_NOW: self._frames.send}
        # Whatever the kernel does not take stops who sends: at most one message lies here.
        transport.set_write_buffer_limits(high=0)
        opened = transport.get_extra_info("socket")
        if opened is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        too_many = len(self.connections) - self._limits.max_connections
        if too_many > 0 and not self._make_room():
            if too_many > NUM_RESERVED:
                self._refuse(TooManyConnections(self._limits.max_connections), "")
                return
            self._header_seconds = min(_CROWDED_SECONDS, self._header_seconds)
            self.app_state = {**self.app_state, CROWDED: self._limits.max_connections}
        self._time_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop every clock."""
        for deadline in (self._headers, self._unwanted, self._unread):
            deadline.stop()
        self._unset_keepalive_if_required()
        self._frames.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless it comes too late."""
        if not self._hung_up:
            super().data_received(data)

    def handle_events(self) -> None:
        """As uvicorn's; then see what the connection waits for."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """As uvicorn's; then see what the connection waits for."""
        super().on_response_complete()
        self._watch()

    @property
    def is_idle(self) -> bool:
        """Whether it waits between two requests."""
        return (
            self.timeout_keep_alive_task is not None
            and not self.transport.is_closing()
            and not self.transport.get_write_buffer_size()
        )

    def _make_room(self) -> bool:
        """Close the connection that has been idle for the longest time."""
        idle = [one for one in self.connections if isinstance(one, BoundedProtocol) and one.is_idle]
        if not idle:
            return False
        min(idle, key=_idle_until).timeout_keep_alive_handler()
        return True

    # --- streams -------------------------------------------------------------------------------

    def send_now(self, frame: bytes) -> bool:
        """Send a part of the running reply, if its headers are out and the client keeps up.

        Returns:
            Whether it was sent. If not, ASGI's `send` has to: it waits, or it knows why not.
        """
        cycle = self.cycle
        if cycle is None or not frame or self.flow.write_paused:
            return False
        if cycle.disconnected or cycle.response_complete or not cycle.response_started:
            return False
        # h11 looks at every part anew, and all but the first are alike: as chunks, they change
        # nothing of what it knows.
        chunk = b"%x\r\n%b\r\n" % (len(frame), frame)
        if self._chunked is not cycle:
            sent = self.conn.send(h11.Data(data=frame))
            self.transport.write(sent)
            self._chunked = cycle if sent == chunk else None
        else:
            self.transport.write(chunk)
        return True

    # --- slow writers --------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._hung_up or self.transport.is_closing():
            return
        if self.conn.has_begun:
            self._unset_keepalive_if_required()
            self._time_headers()
        else:
            self._headers.stop()
        # The reply is out, and the body that it did not wait for is not in.
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            self._unwanted.start(self._limits.header_seconds, lambda: self._cut("body"))
        else:
            self._unwanted.stop()

    def _time_headers(self) -> None:
        self._headers.start(self._header_seconds, self._headers_late)

    def _headers_late(self) -> None:
        begun = self.conn.trailing_data[0]
        if not begun:
            self._cut("headers")  # nothing was asked, so nothing is answered
            return
        seconds = self._header_seconds
        error = RequestTimeout(
            f"the request's headers were not whole within {seconds:g} seconds",
            field="headers",
            expected=f"all of them within {seconds:g} seconds",
            came=f"{len(begun)} bytes",
        )
        self._refuse(error, path_of(begun))

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when it cannot go on reading; `msg` says less than is known here."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The app must not answer what has been refused.
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(*self.conn.refusal)
        else:  # inside a reply: there is no place for another one
            self._cut("malformed")

    def _refuse(self, error: Exception, path: str) -> None:
        """Answer, in the shape that clients of the path expect, and hang up."""
        refusal = self._write_refusal(error, path)
        request_id = uuid.uuid4().hex
        headers: dict[str, str] = {
            "content-type": "application/json",
            "content-length": str(len(refusal.body)),
            "x-request-id": request_id,
            "x-adapter-id": NO_ADAPTER,
            "x-adapter-version": NO_ADAPTER,
            **refusal.headers,
            "connection": "close",
        }
        status = refusal.status
        response = h11.Response(
            status_code=status,
            reason=STATUS_PHRASES[status],
            headers=[
                *self.server_state.default_headers,
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ],
        )
        for event in (response, h11.Data(data=refusal.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        log.info("refused", code=refusal.code, status=status, request_id=request_id)
        self._hang_up(refusal.code)

    def _hang_up(self, why: str) -> None:
        """Say nothing more, and take nothing more in; the client closes, or is cut."""
        self._hung_up = True
        self._unset_keepalive_if_required()
        self._headers.stop()
        self._unwanted.stop()
        self._on_cut(why)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._unwanted.start(_LAST_WORDS_SECONDS, self.transport.abort)

    # --- slow readers --------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The kernel took less than was sent: the client has to read."""
        super().pause_writing()
        self._num_unsent = self.transport.get_write_buffer_size()
        self._unread.start(self._limits.send_seconds, self._unread_late)

    def resume_writing(self) -> None:
        """The kernel has taken everything."""
        self._unread.stop()
        super().resume_writing()

    def _unread_late(self) -> None:
        taken = self._num_unsent - self.transport.get_write_buffer_size()
        if taken < self._limits.bytes_per_second * self._limits.send_seconds:
            self._cut("reader")
            return
        self._num_unsent -= taken
        self._unread.start(self._limits.send_seconds, self._unread_late)

    def _cut(self, why: str) -> None:
        log.info("cut", why=why)
        self._on_cut(why)
        self.transport.abort()


class _Frames:
    """What a request's state holds of its connection, until that is closed.

    Scope and connection would otherwise hold each other, and wait for the garbage collector.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection: BoundedProtocol | None = connection

    def send(self, frame: bytes) -> bool:
        """See `BoundedProtocol.send_now`; False once the connection is closed."""
        return self._connection is not None and self._connection.send_now(frame)

    def close(self) -> None:
        self._connection = None


class _Deadline:
    """A time at which something happens, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, then: Callable[[], None]) -> None:
        """Begin, unless it has begun already."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, self._run, then)

    def stop(self) -> None:
        """Nothing will happen."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self, then: Callable[[], None]) -> None:
        self._handle = None
        then()


def uvicorn_options(
    settings: Settings,
    write_refusal: RefusalWriter,
    on_cut: CutHook = lambda _why: None,
) -> dict[str, Any]:
    """What `uvicorn.Config` must be given besides the app.

    Args:
        settings: where the limits stand.
        write_refusal: writes the bodies of refusals, see `server.http.scope`.
        on_cut: called with a word for each connection that is cut, or refused before the app hears
            of it.
    """
    limits = ConnectionLimits.of(settings)
    limits = replace(limits, max_connections=room_for(limits.max_connections))

    class Connection(BoundedProtocol):
        def __init__(self, **options: Any) -> None:
            super().__init__(limits, write_refusal, on_cut, **options)

    # No route speaks websocket; with "auto" a library that happens to be installed would answer.
    return {"http": Connection, "ws": "none"}


def _idle_until(connection: BoundedProtocol) -> float:
    clock = connection.timeout_keep_alive_task
    return float("inf") if clock is None else clock.when()
