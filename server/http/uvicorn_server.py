"""uvicorn's server with a graceful drain on signals. Independent of routes.

The first SIGTERM or SIGINT begins a drain: the socket goes on accepting, so that probes and new
requests get a 503 with a reason. Once nothing runs, or after `shutdown_seconds`, running requests get an
error, and the process ends with status 0. The second signal ends the wait: running requests get an error,
then the engine and the training jobs are killed; a job resumes from its last checkpoint.
"""

from __future__ import annotations

import asyncio
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from server.config.settings import Settings
from server.http.protocol import uvicorn_options
from server.http.scope import RefusalWriter
from server.services import Services

log = structlog.get_logger(__name__)

# Time for requests aborted at the deadline to send their error.
_LINGER_SECONDS = 2


class GraftworkServer(uvicorn.Server):
    """uvicorn's server, drained before it closes its sockets."""

    def __init__(self, app: FastAPI, settings: Settings, write_refusal: RefusalWriter) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_LINGER_SECONDS,
                **uvicorn_options(settings, write_refusal),
            )
        )
        self._app = app
        self._seconds = settings.shutdown_seconds
        self._num_signals = 0
        self._drain: asyncio.Task[None] | None = None

    @property
    def signalled(self) -> bool:
        """Whether a signal came."""
        return self._num_signals > 0

    @property
    def services(self) -> Services | None:
        """The app's services; None before its start."""
        return getattr(self._app.state, "services", None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain, or end it. The signal is not stored: uvicorn would raise it again."""
        self._num_signals += 1
        services = self.services
        if services is None or services.generator is None:
            self.should_exit = True
        if services is not None:
            services.draining.stop(hurry=self._num_signals > 1)

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn's, ten times a second; starts the drain after a signal."""
        services = self.services
        if self.signalled and services is not None and self._drain is None:
            self._drain = asyncio.create_task(self._end(services))
        return await super().on_tick(counter)

    async def _end(self, services: Services) -> None:
        log.info("draining", running=services.draining.running)
        waiting = asyncio.create_task(services.draining.idle(self._seconds))
        while not waiting.done() and not services.draining.hurried:
            await asyncio.wait((waiting,), timeout=0.1)
        waiting.cancel()
        if services.draining.running:
            # Streams and replies get "aborted", each in the format of its protocol.
            await services.client.stop(0.0 if services.draining.hurried else None)
            await services.draining.idle(_LINGER_SECONDS)
        self.should_exit = True
