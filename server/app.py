"""The composition root: builds the ASGI app from settings.

The app answers `/livez` at once and everything else once the engine is up. Makes no decision about any
request.
"""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
import structlog
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from adapters.errors import BaseUnsupported, StorageFull, StorageUnavailable
from server.api import error_replies
from server.api.adapters import combine, management, vllm_loading
from server.api.bounds import HoldLimits
from server.api.generation import classify, tgi, tokenize
from server.api.generation.openai import chat, completions, embeddings
from server.api.generation.openai.responses import route as responses
from server.api.middleware.authentication import Auth
from server.api.middleware.headers import PAGE_HEADERS, BodyLimit, ReplyHeaders
from server.api.middleware.observation import Observation
from server.api.middleware.route_hints import explained
from server.api.middleware.slow_clients import SlowClients
from server.api.middleware.web_pages import WebPages, host_names
from server.api.openapi.page import DocumentedApp
from server.api.operations import docs_page, drain, front_page, health, models, scrape
from server.api.training import train
from server.api.training.openai import files as tuning_files
from server.api.training.openai import jobs as tuning_jobs
from server.config.base_name import base_name
from server.config.settings import KIB, MIB, Settings
from server.engine.client import EngineClient
from server.engine.errors import EngineStartFailed
from server.engine.process_memory import give_back_free_memory
from server.generation.generator import Generator
from server.generation.observers import Observer
from server.jobs.supervisor import STOP_SECONDS, Supervisor
from server.services import Services
from server.store.data_dir import held_by_server, sweep_folds
from server.store.directories import AdapterDirectory
from server.store.files import FileStore
from server.store.folder_watch import FolderWatch
from server.store.jobs import JobStore
from server.store.key_ring import KeyRing
from server.store.keys import KeyStore
from server.store.registry import Registry
from server.telemetry.tracing import open_tracing
from server.text.tokenizer import TextTokenizer, read_eos_token_ids

log = structlog.get_logger(__name__)

# Often enough to free a filling disk, seldom enough to cost nothing.
COLLECT_SECONDS = 60.0

Hook = Callable[[Services], Awaitable[None]]
# Routes that limit their bodies themselves.
UPLOAD_PATHS = frozenset({"/adapters", "/train", "/v1/files"})


async def _nothing(_services: Services) -> None:
    return


def create_app(
    settings: Settings,
    *,
    client: EngineClient | None = None,
    on_ready: Hook = _nothing,
    on_failure: Hook = _nothing,
    collect_seconds: float = COLLECT_SECONDS,
) -> FastAPI:
    """Build a server.

    Args:
        settings: its settings.
        client: a launched engine with these settings; None makes one.
        on_ready: awaited once the engine is up and requests are accepted.
        on_failure: awaited when the engine did not start; `Services.failure` has the reason.
        collect_seconds: interval between removals of deleted adapters from the disk.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await anyio.to_thread.run_sync(open_services, settings, client)
        services.tracing = await anyio.to_thread.run_sync(open_tracing)
        app.state.services = services
        watch = _folder_watch(services)
        tasks = (
            asyncio.create_task(_start(services, watch, on_ready, on_failure)),
            asyncio.create_task(_collect_for_ever(services, collect_seconds)),
            asyncio.create_task(watch.run()),
        )
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await close_services(services)

    app = DocumentedApp(
        title="Graftwork",
        summary="Many PEFT adapters on one frozen base model",
        lifespan=lifespan,
        # FastAPI's own pages load scripts from other hosts; `docs_page` does not.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # FastAPI's own would add a second span per request, and log bodies that do not fit a schema.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for module in (
        tgi,
        completions,
        chat,
        responses,
        embeddings,
        classify,
        management,
        combine,
        vllm_loading,
        models,
        tokenize,
        train,
        health,
        drain,
        docs_page,
        front_page,
        tuning_files,
        tuning_jobs,
        scrape,
    ):
        app.include_router(module.router)
    error_replies.install(app, explained)
    # The last one added is the outermost.
    app.add_middleware(drain.DrainGate)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_mib * MIB,
        max_values=settings.max_json_values,
        exempt=frozenset(UPLOAD_PATHS),
    )
    app.add_middleware(
        Auth, required=settings.keys_required, metrics_public=settings.metrics_public
    )
    app.add_middleware(
        SlowClients,
        idle_seconds=settings.body_idle_seconds,
        bytes_per_second=settings.client_kib_per_second * KIB,
    )
    app.add_middleware(
        WebPages, hosts=host_names(settings), origins=frozenset(settings.allowed_origins)
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=PAGE_HEADERS,
        )
    app.add_middleware(HoldLimits, by=settings)
    app.add_middleware(Observation)
    app.add_middleware(ReplyHeaders)
    return app


def open_services(settings: Settings, client: EngineClient | None = None) -> Services:
    """Open and sweep the stores; make an engine and a supervisor, not started yet."""
    base_id = base_name(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(
        settings.data_dir,
        reserved=(base_id,),
        limits=settings.checkpoint_limits(),
        max_aliases=settings.max_aliases,
    )
    report = registry.sweep(deep=False)
    if report.corrupt:
        log.warning("adapters_corrupt", digests=report.corrupt)
    sweep_folds(settings.data_dir, registry)
    jobs = JobStore(
        settings.data_dir, queue=settings.queue_limits(), retention=settings.retention()
    )
    jobs.sweep()
    jobs.prune()
    own_mib = settings.max_files_mib_per_owner
    files = FileStore(
        settings.data_dir,
        max_files=settings.max_files,
        max_bytes=settings.max_files_mib * MIB,
        max_files_per_owner=settings.max_files_per_owner,
        max_bytes_per_owner=None if own_mib is None else own_mib * MIB,
    )
    files.sweep()
    supervisor = Supervisor(
        jobs, registry, settings.worker_config(base_id), workers=settings.train_workers
    )
    client = client or EngineClient(settings.engine_config())
    services = Services(
        settings,
        base_id,
        registry,
        client,
        jobs=jobs,
        files=files,
        keys=KeyRing(KeyStore(settings.data_dir)) if settings.keys_required else None,
        supervisor=supervisor,
    )
    client.on_residency = services.metrics.adapter_moved
    return services


def _hold_data_dir(services: Services) -> None:
    """Keep servers of other bases off the data directory until the services are closed."""
    hold = held_by_server(services.settings.data_dir, services.base_id, services.client.base.digest)
    try:
        others = services.holds.enter_context(hold)
    except StorageUnavailable as error:
        if error.field == "data_dir":
            raise
        log.warning("data_dir_not_marked", reason=error.message)
        return
    except (StorageFull, OSError) as error:  # a full disk keeps no server from serving
        log.warning("data_dir_not_marked", reason=str(error))
        return
    if others:
        log.warning(
            "data_dir_shared",
            pids=[one.pid for one in others],
            hint="another server of this base uses the data directory; one directory is for one server",
        )


async def start_engine(services: Services) -> Generator:
    """Start the engine and return its generator; the caller sets `Services.generator`.

    Raises:
        BaseUnsupported, EngineUnavailable: it cannot be started, with the reason.
    """
    tokenizer = await _read_beside(services.client.start(), services.settings)
    services.base_notes = services.client.notes
    services.registry.limit_virtual_tokens(services.client.max_virtual_tokens)
    observers: list[Observer] = [services.metrics, services.quotas, services.placements]
    if services.tracing is not None:
        observers.append(services.tracing)
    return Generator(
        services.client,
        services.registry,
        tokenizer,
        services.base_id,
        observers,
        admit=services.quotas.check_tokens,
        limits=services.settings,
    )


async def _read_beside(starting: Awaitable[None], settings: Settings) -> TextTokenizer:
    """Await the engine's start and return the tokenizer, read meanwhile if its files are local."""
    read = functools.partial(
        anyio.to_thread.run_sync, load_text_tokenizer, settings, abandon_on_cancel=True
    )
    if not Path(settings.base).is_dir():
        await starting
        return await read()
    reading = asyncio.create_task(read())
    try:
        await starting
        return await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def close_services(services: Services) -> None:
    """Let training jobs write a checkpoint, stop the engine, close the stores."""
    services.generator = None
    gc.unfreeze()
    if services.supervisor is not None:
        seconds = float(min(STOP_SECONDS, services.settings.shutdown_seconds))
        if services.draining.hurried:
            seconds = 0.0
        await anyio.to_thread.run_sync(services.supervisor.stop, seconds)
    await services.client.stop(0.0 if services.draining.hurried else None)
    if services.tracing is not None:
        await anyio.to_thread.run_sync(services.tracing.close)
    if services.jobs is not None:
        services.jobs.close()
    if services.files is not None:
        services.files.close()
    if services.keys is not None:
        await anyio.to_thread.run_sync(services.keys.close)
    services.registry.close()
    services.holds.close()


async def collect_garbage(services: Services) -> tuple[str, ...]:
    """Remove deleted adapters from the disk once no request needs them.

    Also drops what the engine caches of them, and counters by their names.

    Returns:
        Their digests; adapters still in use are left for the next call.
    """
    if services.generator is None:
        return ()
    registry = services.registry
    # In this order: a version deleted in between is not among the unused ones yet.
    unused = await anyio.to_thread.run_sync(registry.unused_digests)
    in_use = await services.generator.digests_in_use()
    removed = await anyio.to_thread.run_sync(
        functools.partial(registry.collect_garbage, in_use, among=unused)
    )
    for digest in removed:
        for fold in (services.settings.data_dir / "folds").glob(f"{digest}-*"):
            fold.unlink(missing_ok=True)
        services.client.drop(digest)
        services.placements.drop(digest)
    if counted := {*services.adapter_use.names(), *services.placements.names()}:
        gone = await anyio.to_thread.run_sync(registry.gone, counted)
        services.adapter_use.forget(gone)
        services.placements.forget_names(gone)
    return removed


def load_text_tokenizer(settings: Settings) -> TextTokenizer:
    """The base's tokenizer; the base's files must be on this machine."""
    from server.base.tokenizer import load_tokenizer

    directory = Path(settings.base)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        # The engine has just loaded the base: its files are local.
        directory = Path(
            snapshot_download(settings.base, revision=settings.revision, local_files_only=True)
        )
    return TextTokenizer(load_tokenizer(directory), read_eos_token_ids(directory))


def _folder_watch(services: Services) -> FolderWatch:
    settings = services.settings
    directory = None
    if settings.adapter_dir is not None:
        directory = AdapterDirectory(
            settings.adapter_dir,
            services.registry,
            also_allowed=settings.load_dirs,
            base_names=(services.base_id, settings.base),
            record=settings.data_dir / "watched.json",
        )
    return FolderWatch(
        directory, services.client, settings.adapter_dir_seconds, lambda: services.ready
    )


async def _start(services: Services, watch: FolderWatch, on_ready: Hook, on_failure: Hook) -> None:
    try:
        await watch.look()
        generator = await start_engine(services)
        await anyio.to_thread.run_sync(_hold_data_dir, services)
        # Folders added to the watched directory meanwhile are served from the first request on.
        await watch.sync()
        services.generator = generator
        # These objects live as long as the process: scanned in every collection, they blocked all
        # requests for a second when a body had a hundred thousand lists.
        gc.collect()
        gc.freeze()
        # Memory from reading the tokenizer; the allocator would retain it.
        await anyio.to_thread.run_sync(give_back_free_memory)
        if services.supervisor is not None:
            # Not before: two processes that load the base at once slow each other down.
            services.supervisor.start(services.client.base.digest)
        await on_ready(services)
    except Exception as error:
        if services.draining.stopping:  # the signal reached the engine as well
            return
        services.failure = str(error)
        # A refused base, or what ended the engine's process: no line of this process explains it.
        is_explained = isinstance(error, EngineStartFailed | BaseUnsupported | StorageUnavailable)
        log.error("engine_start_failed", reason=str(error), exc_info=not is_explained)
        await on_failure(services)
        return
    log.info("ready", base=services.base_id, digest=services.client.base.digest)
    if services.keys is not None and services.keys.is_empty():
        log.warning(
            "no_keys", hint="every request is refused; create a key with graftwork keys create"
        )
    elif services.keys is None and not services.settings.is_local:
        log.warning("open_to_all", host=services.settings.host, hint="no keys are required")


async def _collect_for_ever(services: Services, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            removed = await collect_garbage(services)
            if services.jobs is not None:
                await anyio.to_thread.run_sync(services.jobs.prune)
        except Exception:
            log.exception("collect_garbage_failed")
            continue
        if removed:
            log.info("adapters_removed", digests=removed)
        # Memory of a burst of requests; the allocator would retain it.
        await anyio.to_thread.run_sync(give_back_free_memory)
