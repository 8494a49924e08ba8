"""`/train`: create, follow, cancel and delete training jobs. Where an id stands, an adapter's name means
its newest job.

A request is planned before anything is stored, so a job that cannot be trained is refused at once. The jobs
table and the supervisor do the rest. Blocking work runs off the event loop.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from adapters.errors import AdapterExists, NameInvalid, UnsupportedFile
from adapters.training.plan import Plan, make_plan
from server.api.adapter_choice import only_query
from server.api.error_replies import quoted
from server.api.openapi.refusals import PLANNED, STORED, refuses
from server.api.openapi.responses import events, plain
from server.api.training import job_replies
from server.api.training.train_body import OPENAPI_BODY, Received, receive_job
from server.api.training.training_data import DataFacts
from server.errors import JobActive, RequestInvalid
from server.http.event_stream import EventStream, named_event, ping
from server.services import Services, UseServices
from server.store.job_feed import JobFeed
from server.store.job_states import FINISHED
from server.store.jobs import JobEvent, JobRecord, JobStore

router = APIRouter(prefix="/train", tags=["training"])
log = structlog.get_logger(__name__)


PING_SECONDS = 15.0
_MAX_LOG_BYTES = 4 * 1024 * 1024


@router.post(
    "",
    status_code=202,
    summary="Train an adapter",
    response_model=job_replies.Job,
    response_description="The job waits.",
    responses={
        200: {"model": job_replies.Preview, "description": "A dry run: nothing was stored."}
    },
    openapi_extra=OPENAPI_BODY | refuses(UnsupportedFile, *PLANNED),
)
async def train(
    request: Request,
    services: UseServices,
    dry_run: Annotated[
        bool, Query(description="Check everything and show three rows; store nothing.")
    ] = False,
) -> Response:
    """202 with every default resolved; 200 with a preview for a dry run."""
    only_query(request, "dry_run")
    services.need_generator()
    jobs = services.need_jobs()
    with services.registry.staging_dir() as directory:
        received = await receive_job(request, directory, services.settings)
        work = partial(_plan, services, jobs, received, store=not dry_run)
        planned = await services.planning.run(request.state.caller, work)
    record = planned.record
    if record is None:
        preview = job_replies.Preview.of(planned.plan, planned.facts)
        return JSONResponse(preview.model_dump(mode="json"))
    if services.supervisor is not None:
        services.supervisor.wake()
    location = {"location": f"/train/{record.id}"}
    return JSONResponse(
        job_replies.Job.of(record, services.base_digest).model_dump(mode="json"), 202, location
    )


@router.get("", summary="Training jobs, the newest first")
async def list_jobs(
    request: Request,
    services: UseServices,
    offset: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> job_replies.JobList:
    """Without the longer fields; `total` says whether there are more."""
    only_query(request, "offset", "limit")
    jobs = services.need_jobs()
    records = await run_sync(lambda: jobs.list(offset, limit))
    total = await run_sync(jobs.count)
    return job_replies.JobList(
        jobs=[job_replies.ListedJob.of(record, services.base_digest) for record in records],
        total=total,
    )


@router.get(
    "/{job_id}",
    summary="One job: state, progress, metrics, error, and what it does",
)
async def get_job(request: Request, services: UseServices, job_id: str) -> job_replies.Job:
    """`progress` is the last step's event."""
    only_query(request)
    jobs = services.need_jobs()
    job_id = await _found_id(jobs, job_id)
    record = await run_sync(lambda: jobs.get(job_id))
    return job_replies.Job.of(record, services.base_digest)


@router.get(
    "/{job_id}/events",
    summary="What happens to a job, as server-sent events",
    response_class=Response,
    responses={
        200: events(
            job_replies.JobEventData,
            job_replies.EXAMPLE_EVENTS,
            "Past and new events, to the job's end.",
        ),
        204: {"description": "The job has ended, and the client has its last event."},
    },
)
async def job_events(
    request: Request,
    services: UseServices,
    job_id: str,
    after: Annotated[
        int | None, Query(ge=0, lt=2**63, description="Only events after this id.")
    ] = None,
) -> Response:
    """From the first event on, or from after `Last-Event-ID`, else `after`; ends with the job.

    Events are `state`, `started`, `resumed`, `step`, `evaluation`, `checkpoint`, `worker_lost` and
    `interrupted`; their `data` is JSON. A client that reconnects after the last event of a job gets
    204, and so stops.
    """
    only_query(request, "after")
    jobs = services.need_jobs()
    job_id = await _found_id(jobs, job_id)
    record = await run_sync(lambda: jobs.get(job_id))
    resumed = _last_event_id(request)
    start = resumed if resumed is not None else after or 0
    over = resumed is not None and record.state in FINISHED
    # EventSource comes back whenever a stream ends, until it hears 204.
    if over and not await run_sync(lambda: jobs.events(job_id, start, 1)):
        return Response(status_code=204)
    frames = event_frames(services.job_feed, jobs, job_id, start, stopping=services.stopping)
    return EventStream(frames, lambda: None)


@router.get(
    "/{job_id}/log",
    summary="A job's log",
    response_class=PlainTextResponse,
    responses={200: plain("text/plain", "What its workers printed.", "claimed …")},
)
async def job_log(
    request: Request,
    services: UseServices,
    job_id: str,
    tail: Annotated[
        int | None, Query(ge=1, lt=2**63, description="Only the last so many lines.")
    ] = None,
) -> Response:
    """Empty before the job has begun; of a very long one the end."""
    only_query(request, "tail")
    jobs = services.need_jobs()
    job_id = await _found_id(jobs, job_id)
    await run_sync(lambda: jobs.get(job_id))
    return PlainTextResponse(await run_sync(lambda: _log(jobs.directory(job_id), tail)))


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    response_model=job_replies.Job,
    response_description="It has ended.",
    responses={202: {"model": job_replies.Job, "description": "It runs, and is about to stop."}},
    openapi_extra=refuses(*STORED),
)
async def cancel_job(request: Request, services: UseServices, job_id: str) -> Response:
    """202 where it still runs and is about to stop, 200 where it has ended."""
    only_query(request)
    jobs = services.need_jobs()
    job_id = await _found_id(jobs, job_id)
    record = await run_sync(lambda: jobs.cancel(job_id))
    if services.supervisor is not None:
        services.supervisor.wake()
    status = 200 if record.state in FINISHED else 202
    return JSONResponse(
        job_replies.Job.of(record, services.base_digest).model_dump(mode="json"), status
    )


@router.delete(
    "/{job_id}",
    summary="Delete a job that has ended, with its rows and log",
    openapi_extra=refuses(JobActive),
)
async def delete_job(
    request: Request, services: UseServices, job_id: str
) -> job_replies.JobDeleted:
    """The adapter that came of it stays."""
    only_query(request)
    jobs = services.need_jobs()
    job_id = await _found_id(jobs, job_id)
    await run_sync(lambda: jobs.delete(job_id))
    return job_replies.JobDeleted(id=job_id)


async def _found_id(jobs: JobStore, reference: str) -> str:
    """The id of a job, which an adapter's name means too: its newest one.

    Raises:
        JobNotFound: neither.
    """
    return await run_sync(lambda: jobs.find(reference))


# --- a new job -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """A plan, what was understood of its data, and the job unless nothing is to be stored."""

    plan: Plan
    facts: DataFacts
    record: JobRecord | None


def _plan(services: Services, jobs: JobStore, received: Received, *, store: bool) -> _Planned:
    asked = received.request
    try:
        services.registry.require_free(asked.adapter, create_only=asked.if_exists == "error")
    except (NameInvalid, AdapterExists) as error:
        error.field = "adapter"  # which the registry knows as a name
        raise
    tokenizer = services.need_generator().tokenizer
    data = received.read(tokenizer)
    with data.naming_places():
        plan = make_plan(
            data.resolve(asked),
            data.rows,
            tokenizer,
            services.client.base,
            base_name=services.base_id,
            prompts=data.prompts,
            max_virtual_tokens=services.max_virtual_tokens,
            notes=data.warnings,
        )
    record = jobs.create(plan.job, plan.examples) if store else None
    for warning in plan.job.warnings:
        log.warning("training_data", job=None if record is None else record.id, warning=warning)
    return _Planned(plan, data.facts, record)


# --- events and log ------------------------------------------------------------------------


def _last_event_id(request: Request) -> int | None:
    given = request.headers.get("last-event-id")
    if not given:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise RequestInvalid(
            f"Last-Event-ID: expected the id of an event, came {quoted(given)}",
            field="last-event-id",
            expected="a whole number",
            came=quoted(given),
        )
    return int(given)


async def event_frames(
    feed: JobFeed,
    jobs: JobStore,
    job_id: str,
    after: int,
    *,
    ping_seconds: float = PING_SECONDS,
    stopping: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[bytes, None]:
    """All events after an id, and new ones, until the job has ended or is deleted.

    Args:
        feed: polled for events.
        jobs: with the job.
        job_id: the job.
        after: the last event that the client has; 0 for none.
        ping_seconds: a comment is sent after this long without an event.
        stopping: whether to end early; the client reconnects to the next server.
    """
    last = after
    silent_since = time.monotonic()
    news = await feed.now(jobs, job_id, last)
    while not stopping():
        for event in news.events:
            yield _frame(event)
            last = event.id
        if news.ended:
            return
        if news.events:
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since >= ping_seconds:
            yield ping()
            silent_since = time.monotonic()
        read = feed.now if news.more else feed.later
        news = await read(jobs, job_id, last)


def _frame(event: JobEvent) -> bytes:
    return named_event(event.id, event.kind, {**event.data, "at": event.at.isoformat()})


def _log(directory: Path, tail: int | None) -> str:
    try:
        with (directory / "log.txt").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _MAX_LOG_BYTES))
            data = file.read(_MAX_LOG_BYTES)
    except FileNotFoundError:
        return ""
    text = data.decode("utf-8", "replace")
    if tail is None:
        return text
    return "".join(text.splitlines(keepends=True)[-tail:])
