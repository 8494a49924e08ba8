"""Polls the watched directory periodically, off the event loop.

`server.store.directories` implements the scan. Failures here never stop the server.
"""

from __future__ import annotations

import asyncio

import anyio.to_thread
import structlog

from server.services import Services
from server.store.directories import AdapterDirectory

log = structlog.get_logger(__name__)


class FolderWatch:
    """Keeps a server's adapters in sync with its watched directory, if one is configured.

    Args:
        services: the server's services.
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
        """First scan, before the engine starts, so that the next `sync` finds most folders settled."""
        if self._directory is not None:
            await anyio.to_thread.run_sync(self._directory.look)

    async def sync(self) -> None:
        """Publish new folders and remove missing ones. Requires a running engine."""
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
        """Scan and sync in an endless loop."""
        while self._directory is not None:
            await asyncio.sleep(self._seconds)
            if self._services.ready:
                await self.sync()
