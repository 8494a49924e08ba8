"""One hostile case: what is sent, and how the server must answer.

What must come stands in `expected.json`: case -> [status, code, message]; a message that ends in
"..." is a beginning. `code` is `error_type` on the routes whose error has no code.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.hostile.make_files import FILES
from tests.hostile.served import Served

EXPECTED: dict[str, list[Any]] = json.loads((Path(__file__).parent / "expected.json").read_text())


@dataclass(frozen=True)
class Answer:
    """A reply, as far as cases look at it; status 0 is a connection closed without one."""

    status: int
    code: str = ""
    message: str = ""
    content_type: str = ""


@dataclass(frozen=True)
class Case:
    """A name, and what sends it."""

    name: str
    send: Callable[[Served], Answer]


def read(path: str) -> bytes:
    """A file of the corpus."""
    return (FILES / path).read_bytes()


def names(folder: str) -> list[str]:
    """The corpus's files in one folder."""
    return sorted(path.name for path in (FILES / folder).iterdir())


def request(method: str, path: str, **options: Any) -> Callable[[Served], Answer]:
    """An HTTP request by an ordinary client."""

    def send(served: Served) -> Answer:
        with served.client() as client:
            return _told(client.request(method, path, **options))

    return send


def raw(data: bytes, *, close_early: bool = False) -> Callable[[Served], Answer]:
    """Bytes on a socket, and what comes back until the server closes.

    Args:
        data: to send.
        close_early: say after them that no more comes.
    """

    def send(served: Served) -> Answer:
        with socket.create_connection(served.address, 60) as connection:
            received = _exchange(connection, data, close_early=close_early)
        head, _, body = received.partition(b"\r\n\r\n")
        if not head:
            return Answer(0)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        if headers.get("transfer-encoding") == "chunked":
            body = body.partition(b"\r\n")[2].partition(b"\r\n")[0]
        reply = httpx.Response(int(first.split()[1]), headers=headers, content=body)
        # What follows a request may be refused, and never answered.
        assert [line for line in body.split(b"HTTP/1.1 ")[1:] if not line.startswith(b"400 ")] == []
        return _told(reply)

    return send


def _exchange(connection: socket.socket, data: bytes, *, close_early: bool) -> bytes:
    received = b""
    try:
        connection.sendall(data)
        if close_early:
            connection.shutdown(socket.SHUT_WR)
        while block := connection.recv(65536):
            received += block
    except ConnectionError:
        pass  # closed while it was still being sent to
    return received


def _told(reply: httpx.Response) -> Answer:
    kind = reply.headers.get("content-type", "").partition(";")[0]
    if kind != "application/json":
        return Answer(reply.status_code, "", reply.text, kind)
    body = reply.json()
    if not isinstance(body, dict) or "error" not in body:
        return Answer(reply.status_code, "", "", kind)
    error = body["error"] if isinstance(body["error"], dict) else body
    message = error.get("message", body["error"])
    code = error.get("code") or body.get("error_type", "")
    return Answer(reply.status_code, code, message, kind)
