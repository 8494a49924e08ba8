"""uvicorn's h11 protocol with a timeout and a limit for everything that a client can delay.

uvicorn waits without limit for a request's headers, for the rest of a body that the app does not read, and
for a client that reads nothing. Here each of these ends:

    headers     complete within `header_seconds`, or 408
    unread body read and dropped for `header_seconds`, then the connection is closed; chunks are not parsed
    reader      reads what was sent within `send_seconds`, or the connection is closed
    connections above `max_connections`: an idle one is closed to make room; else 503

What a client sends at once is parsed in turns (`server.http.turns`), and so are requests that it sends
without waiting for replies. The rate of bodies that the app reads is checked by
`server.api.middleware.slow_clients`. h11 rather than httptools: its limits can be set, and it is readable
Python; in turns, chunks of one byte delay no stream. Independent of routes.
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
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.config.settings import Settings
from server.errors import RequestTimeout, TooManyConnections
from server.http.connection_limits import BoundedConnection, ConnectionLimits, path_of
from server.http.descriptors import room_for
from server.http.scope import CROWDED, NO_ADAPTER, SEND_NOW, RefusalWriter
from server.http.turns import Turns

log = structlog.get_logger(__name__)

# Send buffer of one connection in the kernel, about 100 KB for a client that does not read. By default
# it grows to megabytes.
SEND_BUFFER_BYTES = 64 * 1024
# Connections beyond `max_connections`, so that health checks are answered even then.
NUM_RESERVED = 32
_CROWDED_SECONDS = 1.0
# Time for a refused client to read why; closing at once could discard the reply.
_LINGER_SECONDS = 1.0

# A request may come in a few small segments, as some clients send a head and a body. Others are gathered:
# each costs a turn of the event loop, whatever its size.
_SMALL_BYTES = 1024
_FREE_SMALL = 8
_GATHER_SECONDS = 0.005
# Between two reads of what is dropped.
_DROP_SECONDS = 0.05

CutHook = Callable[[str], None]


class BoundedProtocol(H11Protocol):
    """One connection.

    Args:
        limits: its limits.
        write_refusal: writes the reply to a request that the app never sees.
        on_cut: called with a reason when it is cut, or refused before the app sees it.
        turns: those of all connections.
        options: uvicorn's.
    """

    conn: BoundedConnection
    flow: _Flow

    def __init__(
        self,
        limits: ConnectionLimits,
        write_refusal: RefusalWriter,
        on_cut: CutHook,
        turns: Turns,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.conn = BoundedConnection(limits)
        # uvicorn annotates int, and passes it to a clock.
        self.timeout_keep_alive = limits.keep_alive_seconds  # type: ignore[assignment]
        self._limits = limits
        self._write_refusal = write_refusal
        self._on_cut = on_cut
        self._header_seconds = limits.header_seconds
        self._headers = _Deadline(self.loop)
        self._unwanted = _Deadline(self.loop)
        self._unread = _Deadline(self.loop)
        self._turns = turns
        self._awaits_turn = False
        self._between_requests = False
        self._num_small = 0
        self._num_unsent = 0
        self._hung_up = False
        # The request whose reply is known to go out in chunks.
        self._chunked: object = None

    # --- the life of a connection --------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept it, or refuse it if there are too many."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._frames = _Frames(self)
        self.app_state = {**self.app_state, SEND_NOW: self._frames.send}
        # `send` blocks on what the kernel does not accept: at most one message is buffered here.
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
        """Stop every timer."""
        for deadline in (self._headers, self._unwanted, self._unread):
            deadline.stop()
        self._unset_keepalive_if_required()
        self._frames.close()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data, unless the connection was refused."""
        if self._hung_up:
            self._pause(_DROP_SECONDS)
            return
        super().data_received(data)
        if self.conn.their_state is h11.DONE:
            self._num_small = 0
        elif len(data) < _SMALL_BYTES:
            self._num_small += 1
            if self._num_small > _FREE_SMALL:
                self._pause(_GATHER_SECONDS)

    def _pause(self, seconds: float) -> None:
        """Read nothing for a while: what comes meanwhile is read at once."""
        if not self._awaits_turn and not self.transport.is_closing():
            self.flow.hold()
            self.loop.call_later(seconds, self._read_on)

    def _read_on(self) -> None:
        if not self._awaits_turn:
            self.flow.let_go()

    def handle_events(self) -> None:
        """As uvicorn's for one turn; then update the timers."""
        if self._hung_up:
            return
        if self._between_requests and self.conn.trailing_data[0]:
            # Requests of which none waits for a reply: each has its turn.
            self._await_turn()
        if self._awaits_turn:
            # uvicorn reads on wherever a body was consumed.
            self.transport.pause_reading()
            return
        self.conn.begin_turn()
        super().handle_events()
        if self.conn.is_held:
            self._await_turn()
        self._update_timers()

    def on_response_complete(self) -> None:
        """As uvicorn's; then update the timers."""
        self._between_requests = True
        super().on_response_complete()
        self._between_requests = False
        self._update_timers()

    def _await_turn(self) -> None:
        """Read no more, and parse the rest of what was received in the next turn."""
        if not self._awaits_turn:
            self._awaits_turn = True
            self.flow.hold()
            self._turns.wait(self.loop, self._take_turn)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        self.flow.let_go()
        if not self.transport.is_closing():
            self.handle_events()

    @property
    def is_idle(self) -> bool:
        """Whether it waits between two requests."""
        return (
            self.timeout_keep_alive_task is not None
            and not self._awaits_turn
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
        """Send a part of the running reply, if its headers were sent and the client keeps up.

        Returns:
            Whether it was sent. If not, ASGI's `send` must send it: it can wait.
        """
        cycle = self.cycle
        if cycle is None or not frame or self.flow.write_paused:
            return False
        if cycle.disconnected or cycle.response_complete or not cycle.response_started:
            return False
        # h11 examines every part, though all after the first are alike: a further chunk does not
        # change its state.
        chunk = b"%x\r\n%b\r\n" % (len(frame), frame)
        if self._chunked is not cycle:
            sent = self.conn.send(h11.Data(data=frame))
            self.transport.write(sent)
            self._chunked = cycle if sent == chunk else None
        else:
            self.transport.write(chunk)
        return True

    # --- slow writers --------------------------------------------------------------------------

    def _update_timers(self) -> None:
        if self._hung_up or self.transport.is_closing():
            return
        if self.conn.has_begun:
            self._unset_keepalive_if_required()
            self._time_headers()
        else:
            self._headers.stop()
        # The reply is complete, and the body that it did not wait for is not.
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            if self.conn.is_chunked:
                self._drop_rest()
                return
            self._unwanted.start(self._limits.header_seconds, lambda: self._cut("body"))
        else:
            self._unwanted.stop()

    def _drop_rest(self) -> None:
        """Drop the rest of a body without looking for its end; the client closes, or is cut."""
        self._hung_up = True
        self._unset_keepalive_if_required()
        self._headers.stop()
        self.flow.let_go()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._unwanted.start(self._limits.header_seconds, lambda: self._cut("body"))

    def _time_headers(self) -> None:
        self._headers.start(self._header_seconds, self._headers_late)

    def _headers_late(self) -> None:
        begun = self.conn.trailing_data[0]
        if not begun:
            self._cut("headers")  # no request, so no reply
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
        """Called by uvicorn on unreadable input; `conn.refusal` has more than `msg`."""
        if self.cycle is not None and not self.cycle.response_complete:
            # The app must not answer what has been refused.
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(*self.conn.refusal)
        else:  # inside a reply: no other can be sent
            self._cut("malformed")

    def _refuse(self, error: Exception, path: str) -> None:
        """Reply in the format that clients of the path expect, and close."""
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
        """Send and read nothing more; the client closes, or is cut."""
        self._hung_up = True
        self._unset_keepalive_if_required()
        self._headers.stop()
        self._unwanted.stop()
        self._on_cut(why)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._unwanted.start(_LINGER_SECONDS, self.transport.abort)

    # --- slow readers --------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The kernel's buffer is full: the client must read."""
        super().pause_writing()
        self._num_unsent = self.transport.get_write_buffer_size()
        self._unread.start(self._limits.send_seconds, self._unread_late)

    def resume_writing(self) -> None:
        """The kernel has accepted everything."""
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


class _Flow(FlowControl):
    """uvicorn's flow control, with reading held between two turns."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._reads = transport
        self._is_held = False

    def hold(self) -> None:
        """Read nothing until `let_go`."""
        self._is_held = True
        self._reads.pause_reading()

    def let_go(self) -> None:
        """Read on, unless uvicorn has paused."""
        if self._is_held:
            self._is_held = False
            if not self.read_paused:
                self._reads.resume_reading()

    def resume_reading(self) -> None:
        """As uvicorn's; while reading is held, it resumes later."""
        if self._is_held:
            self.read_paused = False
        else:
            super().resume_reading()


class _Frames:
    """A connection as the state of its requests refers to it, until it is closed.

    Scope and connection would otherwise refer to each other, and wait for the garbage collector.
    """

    __slots__ = ("_connection",)

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection: BoundedProtocol | None = connection

    def send(self, frame: bytes) -> bool:
        """Send a frame, as `BoundedProtocol.send_now`; False once the connection is closed."""
        return self._connection is not None and self._connection.send_now(frame)

    def close(self) -> None:
        self._connection = None


class _Deadline:
    """A timer that can be stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float, then: Callable[[], None]) -> None:
        """Start, unless it runs already."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, self._run, then)

    def stop(self) -> None:
        """Stop, if it runs."""
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
    """The options of `uvicorn.Config` for this protocol.

    Args:
        settings: the limits.
        write_refusal: writes refusals, see `server.http.scope`.
        on_cut: called with a reason for each connection that is cut, or refused before the app
            sees it.
    """
    limits = ConnectionLimits.of(settings)
    limits = replace(limits, max_connections=room_for(limits.max_connections))

    turns = Turns()

    class Connection(BoundedProtocol):
        def __init__(self, **options: Any) -> None:
            super().__init__(limits, write_refusal, on_cut, turns, **options)

    # There are no websocket routes; with "auto" an installed library would accept them.
    return {"http": Connection, "ws": "none"}


def _idle_until(connection: BoundedProtocol) -> float:
    clock = connection.timeout_keep_alive_task
    return float("inf") if clock is None else clock.when()
