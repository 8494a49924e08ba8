"""Polls the watched directory periodically, off the event loop.

`server.store.directories` implements the scan. Failures here never stop the server.
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
        """First scan, before the engine starts, so that the next `sync` finds most folders settled."""
        if self._directory is not None:
            await anyio.to_thread.run_sync(self._directory.look)

    async def sync(self) -> None:
        """Publish new folders and remove missing ones. Requires a running engine."""
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
        """Scan and sync in an endless loop."""
        while self._directory is not None:
            await asyncio.sleep(self._seconds)
            if self._is_ready():
                await self.sync()
