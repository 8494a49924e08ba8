"""Connections whose bytes cost a server more than they cost them: until its standard input ends.

    python -m tests.benchmarks.costly_bytes KIND PORT CONNECTIONS

A process of its own, and the least urgent one: others would send from another machine, and what that costs
is not measured. A connection that is closed is opened anew.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator

_POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_CHUNKED = _POST + b"Transfer-Encoding: chunked\r\n\r\n"
_GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


def one_byte_chunks() -> Iterator[bytes]:
    """A body whose chunks have one byte."""
    yield _CHUNKED + b"1\r\n[\r\n"
    while True:
        yield b"1\r\n \r\n" * 10_000


def small_chunks() -> Iterator[bytes]:
    """A body whose chunks are as small as they may be."""
    yield _CHUNKED + b"1\r\n[\r\n"
    while True:
        yield b"4\r\n    \r\n" * 7_000


def unwanted_chunks() -> Iterator[bytes]:
    """A body in one-byte chunks that no route reads."""
    yield _CHUNKED.replace(b"/generate", b"/nowhere")
    while True:
        yield b"1\r\n \r\n" * 10_000


def small_segments() -> Iterator[bytes]:
    """A head that comes four bytes a segment."""
    head = _GET + b"a: " + b"b" * 30_000
    while True:
        yield from (head[start : start + 4] for start in range(0, len(head), 4))
        yield b"\r\n\r\n"


def pipelined() -> Iterator[bytes]:
    """Requests in a row whose replies nobody waits for."""
    while True:
        yield (_GET + b"\r\n") * 1000


KINDS = {
    made.__name__: made
    for made in (one_byte_chunks, small_chunks, unwanted_chunks, small_segments, pipelined)
}


def _send(kind: str, port: int) -> None:
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reading = threading.Thread(target=_read, args=(connection,), daemon=True)
                reading.start()
                for data in KINDS[kind]():
                    connection.sendall(data)
        except OSError:
            continue


def _read(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 16):
            pass
        connection.shutdown(socket.SHUT_RDWR)  # the server has closed
    except OSError:
        return


def main() -> None:
    """See the module's head."""
    os.nice(19)
    kind, port, connections = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    for _ in range(connections):
        threading.Thread(target=_send, args=(kind, port), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
