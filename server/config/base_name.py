"""The base's name for clients. Independent of the base's weights and of the server."""

from __future__ import annotations

from pathlib import Path

from server.base.convert import read_manifest
from server.config.settings import Settings


def base_name(settings: Settings) -> str:
    """The base's name for clients; known before the engine is up, since it is reserved."""
    manifest = read_manifest(Path(settings.base)) or {}
    return settings.base_name or str(manifest.get("name") or settings.base_id)
