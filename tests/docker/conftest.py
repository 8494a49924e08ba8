"""The server's fixtures, for what stands in front of it."""

from __future__ import annotations

from tests.server.conftest import server, tiny_base

__all__ = ["server", "tiny_base"]
