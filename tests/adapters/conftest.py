"""Tiny models here too: one thread."""

from tests.server.engine.conftest import one_thread

__all__ = ["one_thread"]
