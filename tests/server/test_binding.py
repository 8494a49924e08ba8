"""The socket that `graftwork serve` listens on."""

from __future__ import annotations

import asyncio
import socket

from server.cli.main import _bind
from server.config.settings import Settings


async def test_replies_do_not_wait_for_acknowledgements():
    found: asyncio.Queue[int] = asyncio.Queue()

    def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ours = writer.get_extra_info("socket")
        found.put_nowait(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    bound = _bind(Settings(port=0))
    async with await asyncio.start_server(connected, sock=bound):
        _, writer = await asyncio.open_connection(*bound.getsockname())
        assert await found.get() == 1
        writer.close()
        await writer.wait_closed()
