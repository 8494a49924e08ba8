"""`/v1/fine_tuning/jobs`: ask for training, follow it, cancel it, in OpenAI's protocol.

Thin: the files become rows, the body becomes a request as `/train` takes it, and the same plan, table
of jobs and supervisor do the rest. Jobs that `/train` made are listed too. Blocking work runs off the
event loop.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request

from adapters.errors import (
    AdapterExists,
    JobInvalid,
    NameInvalid,
    TemplateInvalid,
    UnsupportedFile,
)
from adapters.training.plan import Plan, make_plan
from server.api.adapter_choice import only_query, refuse_stray_adapters
from server.api.error_replies import invalid, quoted
from server.api.middleware.headers import note_ignored
from server.api.openapi.refusals import PLANNED, STORED, refuses
from server.api.schemas import set_extras
from server.api.training.openai import replies
from server.api.training.openai.body import Asked, TuningBody
from server.api.training.openai.data import TuningData, read_data
from server.errors import (
    Contradiction,
    JobNotFound,
    RequestInvalid,
    UnknownParameter,
    UploadNotFound,
)
from server.services import Services, UseServices
from server.store.jobs import JobRecord

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

Limit = Annotated[int, Query(ge=1, le=1000, description="How many at most.")]

DEFAULT_PAGE = 20
_METADATA = re.compile(r"metadata\[([^\]]*)\]")


@router.post(
    "",
    summary="Train an adapter on an uploaded file",
    response_description="The job waits.",
    openapi_extra=refuses(UploadNotFound, UnsupportedFile, *PLANNED),
)
async def create_job(
    request: Request, services: UseServices, body: TuningBody
) -> replies.TuningJob:
    """Checks the data at once, queues the job, and says how it stands.

    `fine_tuned_model` is null until the job has succeeded; then it is the adapter's name, which
    answers as `model` from that moment.
    """
    only_query(request)
    refuse_stray_adapters(body.model_extra or {}, place="suffix")
    note_ignored(request, set_extras(body))
    services.need_generator()
    _require_base(services, body.model)
    asked = Asked(body)
    work = partial(_create, services, asked)
    record = await services.planning.run(request.state.caller, work)
    if services.supervisor is not None:
        services.supervisor.wake()
    return replies.tuning_job(record)


@router.get(
    "",
    summary="Training jobs, the newest first",
    openapi_extra=refuses(JobNotFound),
)
async def list_jobs(
    request: Request,
    services: UseServices,
    after: Annotated[
        str | None, Query(description="Only jobs older than the one with this id.")
    ] = None,
    limit: Limit = DEFAULT_PAGE,
) -> replies.TuningJobList:
    """A page; `metadata[NAME]=VALUE` keeps jobs with these texts, `metadata=null` those without."""
    wanted, none_wanted = _metadata(request)
    jobs = services.need_jobs()
    found = await run_sync(
        lambda: jobs.list_after(after, limit + 1, wanted, without_metadata=none_wanted)
    )
    return replies.TuningJobList.of([replies.tuning_job(record) for record in found], limit)


@router.get("/{job_id}", summary="One training job")
async def get_job(request: Request, services: UseServices, job_id: str) -> replies.TuningJob:
    """`GET /train/{id}` says more of the same job."""
    only_query(request)
    jobs = services.need_jobs()
    return replies.tuning_job(await run_sync(lambda: jobs.get(job_id)))


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a training job",
    response_description="The job's state now.",
    openapi_extra=refuses(*STORED),
)
async def cancel_job(request: Request, services: UseServices, job_id: str) -> replies.TuningJob:
    """One that runs is still `running` in the reply, and `cancelled` within seconds.

    A job that has ended stays as it is.
    """
    only_query(request)
    jobs = services.need_jobs()
    record = await run_sync(lambda: jobs.cancel(job_id))
    if services.supervisor is not None:
        services.supervisor.wake()
    return replies.tuning_job(record)


@router.get(
    "/{job_id}/events",
    summary="What happened to a training job, the newest first",
)
async def list_events(
    request: Request,
    services: UseServices,
    job_id: str,
    after: Annotated[
        str | None,
        Query(
            description="Only events older than the one with this id.",
            json_schema_extra={"pattern": "^(ftevent-job-[0-9a-f]{24}-)?[0-9]{1,18}$"},
        ),
    ] = None,
    limit: Limit = DEFAULT_PAGE,
) -> replies.TuningEventList:
    """A page; `GET /train/{id}/events` streams the same events as they happen."""
    only_query(request, "after", "limit")
    jobs = services.need_jobs()
    before = None if after is None else _number(job_id, after)
    found = await run_sync(lambda: jobs.events_before(job_id, before, limit + 1))
    return replies.TuningEventList.of(
        [replies.tuning_event(job_id, event) for event in found], limit
    )


@router.get(
    "/{job_id}/checkpoints",
    summary="Always empty: only the end is served",
)
async def list_checkpoints(
    request: Request,
    services: UseServices,
    job_id: str,
    after: Annotated[str | None, Query(description="Without effect.")] = None,
    limit: Limit = DEFAULT_PAGE,
) -> replies.CheckpointList:
    """What a worker saves on its way is for itself to go on from."""
    only_query(request, "after", "limit")
    jobs = services.need_jobs()
    await run_sync(lambda: jobs.get(job_id))
    return replies.CheckpointList.of([], limit)


# --- a new job -------------------------------------------------------------------------------------


def _require_base(services: Services, model: str) -> None:
    if model != services.base_id:
        raise RequestInvalid(
            f"model: expected the base, {services.base_id!r}; adapters are trained on it, and not on "
            f"other adapters; came {quoted(model)}",
            field="model",
            expected=services.base_id,
            came=quoted(model),
        )


def _create(services: Services, asked: Asked) -> JobRecord:
    name = asked.body.suffix
    try:
        if name is None:
            name = services.registry.free_name("ft-")
        create_only = asked.block.if_exists == "error"
        services.registry.require_free(name, create_only=create_only)
    except (NameInvalid, AdapterExists) as error:
        error.field = "suffix"
        raise
    limits = services.settings.data_limits()
    tokenizer = services.need_generator().tokenizer
    data = read_data(services.need_files(), asked, tokenizer, limits)
    with data.naming_places():
        plan = _plan(services, asked, name, data)
    return services.need_jobs().create(plan.job, plan.examples, replies.tuning_of(asked))


def _plan(services: Services, asked: Asked, name: str, data: TuningData) -> Plan:
    try:
        return make_plan(
            asked.request(name, data.template, data.target, data.separator, data.format),
            data.rows,
            services.need_generator().tokenizer,
            services.client.base,
            base_name=services.base_id,
            num_validation_rows=data.num_validation_rows,
            prompts=data.prompts,
            max_virtual_tokens=services.max_virtual_tokens,
            notes=data.warnings,
        )
    except (JobInvalid, TemplateInvalid) as error:
        # Their fields are those of /train, which stand in the method's block here.
        error.field = f"{asked.place}.{error.field}" if error.field else asked.place
        raise


# --- queries ---------------------------------------------------------------------------------------


def _metadata(request: Request) -> tuple[dict[str, str], bool]:
    """The filter: texts by name, and whether only jobs without metadata are wanted."""
    wanted: dict[str, str] = {}
    none_wanted = False
    for name, value in request.query_params.multi_items():
        found = _METADATA.fullmatch(name)
        if found:
            wanted[found.group(1)] = value
        elif name == "metadata":
            if value != "null":
                raise invalid("metadata", "metadata[NAME]=VALUE, or metadata=null", quoted(value))
            none_wanted = True
        elif name not in ("after", "limit"):
            raise UnknownParameter(
                f"unknown query parameter {name!r}; this route takes after, limit, metadata[NAME]",
                field=name,
                expected="after, limit, metadata[NAME]",
                came=name,
            )
    if wanted and none_wanted:
        raise Contradiction(
            "metadata=null and metadata[NAME] are both given",
            field="metadata",
            expected="one of them",
            came="both",
        )
    return wanted, none_wanted


def _number(job_id: str, after: str) -> int:
    number = replies.event_number(job_id, after)
    if number is None:
        raise invalid(
            "after", f"the id of an event of {job_id} (ftevent-JOB-NUMBER)", quoted(after)
        )
    return number
