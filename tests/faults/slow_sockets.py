"""Clients that are slow on purpose: bare sockets, each a coroutine. Knows nothing of what it asks."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

Address = tuple[str, int]
BLOCK = 65536


class Slow:
    """One connection.

    Args:
        address: whom to.
        receive_bytes: what the kernel takes in before anybody reads; None leaves it alone.
    """

    def __init__(self, address: Address, receive_bytes: int | None = None) -> None:
        self._address = address
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if receive_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Slow:
        await self._loop.sock_connect(self._socket, self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def receive(self) -> bytes:
        """What has come; nothing once the other side is done."""
        return await self._loop.sock_recv(self._socket, BLOCK)

    async def until_closed(self) -> bytes:
        """All that comes until the other side closes or cuts."""
        received = b""
        try:
            while block := await self.receive():
                received += block
        except ConnectionError:
            pass
        return received

    async def dribble(self, piece: bytes, seconds: float) -> bytes:
        """Send a piece now and then for as long as it is taken; what came back meanwhile."""
        reading = asyncio.create_task(self.until_closed())
        try:
            while not reading.done():
                await self.send(piece)
                await asyncio.wait((reading,), timeout=seconds)
        except ConnectionError:
            pass
        return await reading


def request(method: str, path: str, body: Any = None, *, length: int | None = None) -> bytes:
    """A request's bytes. `length` is told in its place, where the body is not whole."""
    content = (
        b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    )
    lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
    if body is not None:
        lines += ["content-type: application/json", f"content-length: {length or len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


def status_and_body(reply: bytes) -> tuple[int, Any]:
    """Of a reply that is whole; its body is JSON."""
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)
