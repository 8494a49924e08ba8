"""The clock of the watched directory: looks into it now and then, off the event loop.

What a look means is `server.store.directories`'s to say. Nothing that fails here ends the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import anyio.to_thread
import structlog

from server.engine.client import EngineClient
from server.store.directories import AdapterDirectory

log = structlog.get_logger(__name__)


class FolderWatch:
    """Keeps a registry up to a watched directory; does nothing where there is none.

    Args:
        directory: the watched one; None is none.
        client: the engine, for the base that adapters must fit, and to unload what is gone.
        seconds: between two looks.
        is_ready: whether the server takes requests; nothing is looked at before.
    """

    def __init__(
        self,
        directory: AdapterDirectory | None,
        client: EngineClient,
        seconds: float,
        is_ready: Callable[[], bool],
    ) -> None:
        self._directory = directory
        self._client = client
        self._seconds = seconds
        self._is_ready = is_ready

    async def look(self) -> None:
        """Look for the first time: before the engine starts, so that `sync` after it finds most settled."""
        if self._directory is not None:
            await anyio.to_thread.run_sync(self._directory.look)

    async def sync(self) -> None:
        """Take what is new and let go of what is gone. The engine is up."""
        if self._directory is None:
            return
        client = self._client
        try:
            changes = await anyio.to_thread.run_sync(self._directory.sync, client.base)
        except Exception:
            log.exception("adapter_dir_failed")
            return
        for record in changes.published:
            log.info("adapter_folder_taken", name=record.name, version=record.version)
        for name in changes.removed:
            log.info("adapter_folder_gone", name=name)
        if client.alive:
            for digest in changes.unused:
                client.unload(digest)

    async def run(self) -> None:
        """Look and sync for ever."""
        while self._directory is not None:
            await asyncio.sleep(self._seconds)
            if self._is_ready():
                await self.sync()
