"""The clock of the watched directory: looks into it now and then, off the event loop.

What a look means is `server.store.directories`'s to say. Nothing that fails here ends the server.
"""

from __future__ import annotations

import asyncio

import anyio.to_thread
import structlog

from server.services import Services
from server.store.directories import AdapterDirectory

log = structlog.get_logger(__name__)


class FolderWatch:
    """Keeps a server's adapters up to its watched directory; does nothing where there is none.

    Args:
        services: of the server.
    """

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self._services = services
        self._seconds = settings.adapter_dir_seconds
        self._directory: AdapterDirectory | None = None
        if settings.adapter_dir is not None:
            self._directory = AdapterDirectory(
                settings.adapter_dir,
                services.registry,
                also_allowed=settings.load_dirs,
                base_names=(services.base_id, settings.base),
            )

    async def look(self) -> None:
        """Look for the first time: before the engine starts, so that `sync` after it finds most settled."""
        if self._directory is not None:
            await anyio.to_thread.run_sync(self._directory.look)

    async def sync(self) -> None:
        """Take what is new and let go of what is gone. The engine is up."""
        if self._directory is None:
            return
        client = self._services.client
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
            if self._services.ready:
                await self.sync()
