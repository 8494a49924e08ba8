"""The parts of one running server, and how routes get them.

`server.app` fills in `Services`; while the engine is loading, what needs it is refused with `NotReady`.
Independent of routes.
"""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends, Request

from server.config.settings import Settings
from server.draining import Draining
from server.errors import NotReady
from server.generation.fair_threads import FairThreads
from server.generation.sent_warnings import SentWarnings
from server.store.caller import UNRESTRICTED, Caller
from server.telemetry.adapter_use import UseByAdapter

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from server.engine.client import EngineClient
    from server.engine.request import AdapterRef
    from server.generation.generator import Generator
    from server.generation.placements import Placements, Residency
    from server.generation.quotas import Quotas
    from server.jobs.supervisor import Supervisor
    from server.store.files import FileStore
    from server.store.job_feed import JobFeed
    from server.store.jobs import JobStore
    from server.store.key_ring import KeyRing
    from server.store.registry import AdapterRecord, Registry
    from server.telemetry.metrics import Metrics
    from server.telemetry.tracing import Tracing


TableT = TypeVar("TableT")


@dataclass
class Services:
    """One running server.

    Attributes:
        settings: its settings.
        base_id: the base's name; no adapter can have it.
        registry: the adapters.
        engine: started or starting; None in an application that needs none.
        base: the base's dimensions where no engine is started; else None, the engine knows them.
        base_notes: sentences about the base's weights, for `GET /v1/models`.
        generator: None until the engine is ready.
        failure: why the engine did not start; None if it did, or has not tried yet.
        started_at: Unix time, seconds.
        tracing: where spans go; None if tracing is off.
        adapter_use: requests by adapter since the start; deleting the last version of a name resets
            its counters.
        jobs: the training jobs; None in an application without them.
        files: the uploaded training files; None in an application without them.
        keys: the API keys; None if none are required.
        supervisor: runs training jobs here; None if only `graftwork worker` does.
        draining: whether new work is refused, and what runs.
        prompt_warnings: warnings about prompts that look unlike an adapter's training.
        planning: where jobs are planned: one at a time, since each may hold a whole file.
        holds: what is held until the services are closed: the mark on the data directory.
    """

    settings: Settings
    base_id: str
    registry: Registry
    engine: EngineClient | None
    base: BaseModelSpec | None = None
    base_notes: tuple[str, ...] = ()
    generator: Generator | None = None
    failure: str | None = None
    started_at: float = field(default_factory=time.time)
    tracing: Tracing | None = None
    adapter_use: UseByAdapter = field(default_factory=UseByAdapter)
    jobs: JobStore | None = None
    files: FileStore | None = None
    keys: KeyRing | None = None
    supervisor: Supervisor | None = None
    draining: Draining = field(default_factory=Draining)
    prompt_warnings: SentWarnings = field(default_factory=SentWarnings)
    planning: FairThreads = field(default_factory=lambda: FairThreads(1))
    holds: ExitStack = field(default_factory=ExitStack)

    def seen_by(self, caller: Caller) -> Services:
        """These services with the stores and the generator as a caller sees them."""
        if caller == UNRESTRICTED:
            return self
        # Made before the copy: all callers share them.
        _ = (self.metrics, self.quotas, self.job_feed, self.placements)
        view = copy.copy(self)
        view.registry = self.registry.seen_by(caller)
        view.generator = self.generator and self.generator.seen_by(caller)
        view.jobs = self.jobs and self.jobs.seen_by(caller)
        view.files = self.files and self.files.seen_by(caller)
        return view

    # These are imported on first use: commands that need neither start faster.

    @cached_property
    def metrics(self) -> Metrics:
        """The counters of this server."""
        from server.telemetry.metrics import Metrics

        return Metrics(self.settings.metrics_adapters)

    @cached_property
    def quotas(self) -> Quotas:
        """The usage of each key."""
        from server.generation.quotas import Quotas

        return Quotas()

    @cached_property
    def job_feed(self) -> JobFeed:
        """The news of jobs, for those who follow them."""
        from server.store.job_feed import JobFeed

        return JobFeed()

    @cached_property
    def placements(self) -> Placements:
        """Under which names the adapters on the device were used."""
        from server.generation.placements import Placements

        return Placements()

    def residency(self, record: AdapterRecord) -> Residency:
        """Where a name's adapter is now; "disk" while no engine is ready."""
        if not self.ready:
            return "disk"
        actual = self.client.residency(record.digest)
        return self.placements.residency(record.digest, record.name, actual)

    def preload(self, adapter: AdapterRef) -> None:
        """Make a name's adapter resident when there is room."""
        self.placements.use(adapter)
        self.client.preload(adapter)

    def unload(self, digest: str, name: str) -> None:
        """Let a name's adapter leave the device, unless it or another name with its bytes is in use."""
        if self.placements.leave(digest, name):
            self.client.unload(digest)

    @property
    def client(self) -> EngineClient:
        """The engine.

        Raises:
            NotReady: this application has none.
        """
        if self.engine is None:
            raise NotReady("not ready: no engine is started here")
        return self.engine

    @property
    def max_virtual_tokens(self) -> int:
        """Virtual tokens that a new adapter may have: the setting, or less where the engine has no room."""
        most = self.settings.max_virtual_tokens
        return most if self.generator is None else min(most, self.client.max_virtual_tokens)

    @property
    def ready(self) -> bool:
        """Whether a generation would be accepted now."""
        return self.generator is not None and self.client.alive

    @property
    def base_digest(self) -> str | None:
        """Digest of the base that is served; None while it is loading."""
        if self.base is not None:
            return self.base.digest
        return None if self.generator is None else self.client.base.digest

    def stopping(self) -> bool:
        """Whether the server is stopping; open-ended streams end then."""
        return self.draining.stopping

    def need_generator(self) -> Generator:
        """The generator.

        Raises:
            NotReady: the engine is loading, or is down.
        """
        if self.generator is None or not self.client.alive:
            reason = self.failure or (
                "the base model is still loading"
                if self.generator is None
                else "the engine's process is down and is started again"
                if self.client.restarting
                else "the engine's process is down"
            )
            raise NotReady(f"not ready: {reason}")
        return self.generator

    def need_base(self) -> BaseModelSpec:
        """The base that adapters must fit.

        Raises:
            NotReady: the engine is still loading it, or is gone.
        """
        if self.base is not None:
            return self.base
        self.need_generator()
        return self.client.base

    def need_jobs(self) -> JobStore:
        """The training jobs.

        Raises:
            NotReady: this application has none.
        """
        return _there(self.jobs, "training jobs")

    def need_keys(self) -> KeyRing:
        """The API keys.

        Raises:
            NotReady: this application has none.
        """
        return _there(self.keys, "keys")

    def need_files(self) -> FileStore:
        """The uploaded training files.

        Raises:
            NotReady: this application has none.
        """
        return _there(self.files, "files")


def _there(table: TableT | None, what: str) -> TableT:
    if table is None:
        raise NotReady(f"not ready: this server has no table of {what}")
    return table


async def get_services(request: Request) -> Services:
    """The services of the app that serves this request, as its caller sees them."""
    # A coroutine: FastAPI would run a plain function in a thread, and may have to wait for one.
    services: Services = request.app.state.services
    return services.seen_by(request.state.caller)


UseServices = Annotated[Services, Depends(get_services)]
