"""The application in the command's own process: a `Backend` without a server.

    DataDirectory     the routes of adapters and jobs on a data directory; no engine is started
    PrivateEngine     the routes of generation on an engine that is started for one command

No key is needed: who can write the folder owns it. Each application has only the routes and services
that its commands use, since importing the others takes longer than most commands.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError, RegistryError
from server.cli.asgi_transport import ASGITransport
from server.cli.backend import AdapterFiles, Answer, Backend, GenerationInput, Json, stage
from server.cli.http_client import RemoteServer
from server.config.settings import Settings

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

    from adapters.base_model import BaseModelSpec
    from server.cli.found_adapters import FoundAdapter
    from server.services import Services
    from server.store.jobs import JobStore
    from server.store.registry import Registry

# Never resolved: requests go to the application.
_URL = "http://localhost"
# The one adapter of an engine that is started for a command.
_ONLY = "adapter"


class DataDirectory(Backend):
    """The adapters and jobs of a data directory. Servers may run on it meanwhile.

    Args:
        settings: which directory, and the base that new adapters must fit.
        create: make the directory if it is not there.
        reads_base: whether adapters are added or combined.
        jobs: whether it is about jobs, not adapters.

    Raises:
        RegistryError: there is no data directory, and none is to be made.
        BaseUnsupported: the base cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        create: bool = False,
        reads_base: bool = False,
        jobs: bool = False,
    ) -> None:
        from server.config.base_name import base_name
        from server.store.jobs import JobStore
        from server.store.registry import Registry

        if create:
            settings.data_dir.mkdir(parents=True, exist_ok=True)
        else:
            require_data_dir(settings.data_dir)
        with ExitStack() as opened:
            self._settings = settings
            self._base_id = base_name(settings)
            self._registry: Registry = Registry(
                settings.data_dir, reserved=(self._base_id,), max_aliases=settings.max_aliases
            )
            opened.callback(self._registry.close)
            self._jobs: JobStore = JobStore(settings.data_dir, queue=settings.queue_limits())
            opened.callback(self._jobs.close)
            self._base: BaseModelSpec | None = None
            if reads_base:
                from server.base.load import describe_base

                self._base = describe_base(settings.base, revision=settings.revision)

            def make() -> FastAPI:
                return _application(self._services, *_routers(combines=reads_base, jobs=jobs))

            transport = ASGITransport(_on_first_request(make))
            super().__init__(RemoteServer(_URL, transport=transport))
            self._opened = opened.pop_all()

    @cached_property
    def _services(self) -> Services:
        from server.services import Services

        return Services(
            self._settings, self._base_id, self._registry, None, base=self._base, jobs=self._jobs
        )

    def close(self) -> None:
        """Close the databases."""
        super().close()
        self._opened.close()

    def adapter(self, reference: str) -> Json:
        """As `Backend.adapter`, with the config of every version and without counters."""
        shown = super().adapter(reference)
        del shown["counters"]  # of a running server's requests
        if shown["config"] is None:
            shown["config"] = self._config(shown["digest"])
        return shown

    def add(self, source: AdapterFiles) -> Json:
        """Publish an adapter with all its metadata; an upload has no place for a recipe."""
        from adapters.metadata import AdapterMetadata
        from server.api.adapters.versions import AdapterVersion

        services = self._services
        with self._registry.staging_dir() as directory:
            found = stage(source.path, directory)
            base = services.need_base()
            published = self._registry.publish(
                source.name,
                directory,
                base,
                AdapterMetadata(**source.metadata),
                warnings=found.warnings(base.vocab_size),
                base_names=(services.base_id, services.settings.base),
            )
        record = AdapterVersion.of(published.record).model_dump(mode="json", by_alias=True)
        return {**record, "created": published.created, "ignored_files": [*found.ignored]}

    def jobs(self, offset: int, limit: int) -> list[Json]:
        """Jobs with all their fields, the newest first; as many as there are."""
        from server.api.training.job_replies import Job

        return [Job.of(record).model_dump(mode="json") for record in self._jobs.list(offset, limit)]

    def job_events(self, job_id: str, after: int, *, follow: bool) -> Iterator[Json]:
        """As `Backend.job_events`; without `follow` there is no silence to wait for."""
        if follow:
            yield from super().job_events(job_id, after, follow=True)
            return
        job_id = self._jobs.find(job_id)
        while found := self._jobs.events(job_id, after):
            for event in found:
                shown = {"id": event.id, "kind": event.kind, "data": event.data}
                yield {**shown, "at": event.at.isoformat()}
            after = found[-1].id

    def _config(self, digest: str) -> Json | None:
        from adapters.checkpoint.folder import CONFIG_FILE, read_config

        try:
            return read_config(self._registry.blob_path(digest) / CONFIG_FILE)
        except (AdapterError, OSError):
            return None  # `status` says that the stored bytes are damaged


class PrivateEngine(Backend):
    """An engine in a process of its own, started for one command and stopped by `close`.

    A data directory is only read, so that servers may run on it.

    Args:
        settings: the base, and how the engine runs.
        found: the one adapter, which every request gets; None is the base alone.

    Raises:
        CheckpointError, BaseMismatch: the adapter does not fit the base.
        EngineError: the engine did not start, with the reason.
    """

    def __init__(self, settings: Settings, found: FoundAdapter | None) -> None:
        from server.engine.client import EngineClient

        with ExitStack() as opened:
            work = opened.enter_context(tempfile.TemporaryDirectory(prefix="graftwork-"))
            own = settings.model_copy(update={"data_dir": Path(work)})
            engine = EngineClient(own.engine_config())
            engine.launch()
            # These take as long to import as the engine does.
            from server.api.generation import tgi
            from server.app import start_engine
            from server.services import Services
            from server.store.registry import Registry

            registry = Registry(own.data_dir)
            opened.callback(registry.close)
            services = Services(own, "", registry, engine)
            transport = ASGITransport(_application(services, tgi.router))
            opened.callback(transport.close)
            opened.callback(lambda: transport.call(engine.stop))
            services.generator = transport.call(start_engine, services)
            self._adapter = None if found is None else _publish(registry, found, services)
            server = RemoteServer(_URL, transport=transport)
            super().__init__(server, at_once=settings.max_running)
            self._opened = opened.pop_all()

    def answers(
        self, adapter: str | None, prompts: Sequence[GenerationInput], parameters: Mapping[str, Any]
    ) -> Iterator[Answer]:
        """As `Backend.answers`, with the one adapter."""
        return super().answers(self._adapter, prompts, parameters)

    def pieces(
        self, adapter: str | None, prompt: GenerationInput, parameters: Mapping[str, Any]
    ) -> Iterator[str]:
        """As `Backend.pieces`, with the one adapter."""
        return super().pieces(self._adapter, prompt, parameters)

    def close(self) -> None:
        """Stop the engine."""
        self._opened.close()
        super().close()


def _routers(*, combines: bool, jobs: bool) -> list[APIRouter]:
    if jobs:
        from server.api.training import train

        return [train.router]
    from server.api.adapters import management

    if not combines:
        return [management.router]
    from server.api.adapters import combine

    return [management.router, combine.router]


def _publish(registry: Registry, found: FoundAdapter, services: Services) -> str:
    from adapters.metadata import AdapterMetadata

    metadata = AdapterMetadata(
        template=found.metadata.get("template"),
        tokenization=found.metadata.get("tokenization") or "boundary",
        base_digest=found.base_digest,
    )
    with registry.staging_dir() as directory:
        stage(found.directory, directory)
        registry.publish(_ONLY, directory, services.need_base(), metadata)
    return _ONLY


def _on_first_request(make: Callable[[], ASGIApp]) -> ASGIApp:
    """An application that is made for its first request: commands that send none start without it."""
    made = cache(make)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await made()(scope, receive, send)

    return app


def _application(services: Services, *routers: APIRouter) -> FastAPI:
    """Some of the server's routes, with its replies to errors, for callers in this process."""
    from fastapi import FastAPI

    from server.api import error_replies
    from server.api.bounds import HoldLimits
    from server.api.middleware.authentication import Auth
    from server.api.middleware.headers import ReplyHeaders
    from server.api.middleware.route_hints import explained

    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for router in routers:
        app.include_router(router)
    error_replies.install(app, explained)
    app.add_middleware(Auth, required=False)
    app.add_middleware(HoldLimits, by=services.settings)
    app.add_middleware(ReplyHeaders)
    app.state.services = services
    return app


def require_data_dir(directory: Path) -> None:
    """Refuse a directory that holds no adapters and jobs.

    Raises:
        RegistryError: it is none.
    """
    if not directory.is_dir():
        raise RegistryError(
            f"there is no data directory {directory}; name another with --data-dir, or a running "
            "server with --url"
        )
    if not (directory / "registry.db").is_file():
        raise RegistryError(
            f"{directory} is no data directory: it holds no registry.db; name another with "
            "--data-dir, or a running server with --url"
        )
