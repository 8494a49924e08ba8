"""Training jobs and their events as OpenAI's objects.

A job that `/train` made is shown in the same form: it has no files, and the method's own name as its
type. Knows no store and no route.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Generic, Literal, Self, TypeVar

from adapters.training.job import TrainingJob
from adapters.training.recipes import RECIPES
from server.api.reply_fields import ReplyModel, UnixTime, fixed, shows
from server.api.training.openai.body import SUPERVISED, Asked
from server.store.job_states import State
from server.store.jobs import JobEvent, JobRecord

_FILE = "file-0123456789abcdef01234567"
_JOB = "job-a1ab28fe4d34fda420b6c479"
_EVENT = f"ftevent-{_JOB}-7"
ItemT = TypeVar("ItemT")
_NO_TUNING: dict[str, Any] = {}
# Fields of a job that a method's block has.
_BLOCK = (
    "config",
    "template",
    "target",
    "labels",
    "label_names",
    "target_separator",
    "append_eos",
    "tokenization",
    "max_length",
    "on_too_long",
    "init_text",
    "context_examples",
    "context_seed",
    "train_on_context",
    "if_exists",
    "description",
)
# CPT's ids and masks are as long as its context.
_LONG_CONFIG = ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")


class Page(ReplyModel, Generic[ItemT]):
    """A page of a list in OpenAI's shape."""

    object: Literal["list"] = fixed("list", "What this is.")
    data: list[ItemT] = shows([], "The objects.")
    first_id: str | None = shows(_JOB, "Id of the first one here.")
    last_id: str | None = shows(_JOB, "Id of the last one here, for `after`.")
    has_more: bool = shows(False, "Whether there are more behind it.")

    @classmethod
    def of(cls, found: list[ItemT], limit: int) -> Self:
        """The page of up to `limit` + 1 objects that were found."""
        data = found[:limit]
        ids = [*map(attrgetter("id"), data)]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=len(found) > limit)


class TuningValues(ReplyModel):
    """OpenAI's hyperparameters, resolved."""

    n_epochs: int | None = shows(3, "Passes over the data; null where max_steps was given.")
    batch_size: int = shows(8, "Rows a forward pass.")
    learning_rate_multiplier: float = shows(1.0, "Times the learning rate of the recipe.")


class TuningError(ReplyModel):
    """Why a job failed."""

    code: str = shows("training_diverged", "For programs; the documentation lists them.")
    message: str = shows("the loss of step 3 is nan", "For people.")
    param: str | None = shows(None, "training_file, where that was at fault.")


class TuningJob(ReplyModel):
    """OpenAI's `fine_tuning.job`."""

    object: Literal["fine_tuning.job"] = fixed("fine_tuning.job", "What this is.")
    id: str = shows(_JOB, "The job, here and under /train.")
    model: str = shows("SmolLM2-135M-Instruct", "The base.")
    created_at: UnixTime = shows(1795376932, "Unix time, seconds.")
    finished_at: UnixTime | None = shows(None, "Likewise; null until it has ended.")
    estimated_finish: None = fixed(None, "Always null; events of /train have the seconds left.")
    fine_tuned_model: str | None = shows("complaints", "The adapter, once it has succeeded.")
    organization_id: str = fixed("graftwork", "Always graftwork.")
    result_files: list[str] = fixed([], "Always empty.")
    status: State = shows("succeeded", "How it stands.")
    training_file: str = shows(_FILE, "The file; empty for a job of /train.")
    validation_file: str | None = shows(None, "The file with rows held out.")
    hyperparameters: TuningValues = shows({}, "OpenAI's, resolved.")
    method: dict[str, Any] = shows(
        {"type": "ia3", "ia3": {"hyperparameters": {}}}, "The method with everything resolved."
    )
    trained_tokens: int | None = shows(12771, "Of prompts and answers, over all steps.")
    error: TuningError | None = shows(None, "Why it failed.")
    seed: int = shows(0, "Of weights, order and dropout.")
    integrations: list[Any] = fixed([], "Always empty.")
    user_provided_suffix: str | None = shows("complaints", "As it was given.")
    metadata: dict[str, str] | None = shows({"team": "support"}, "As it was given.")


class TuningJobList(Page[TuningJob]):
    """A page of jobs, the newest first."""


class TuningEvent(ReplyModel):
    """OpenAI's `fine_tuning.job.event`."""

    object: Literal["fine_tuning.job.event"] = fixed("fine_tuning.job.event", "What this is.")
    id: str = shows(_EVENT, "The event.")
    created_at: UnixTime = shows(1795376932, "Unix time, seconds.")
    level: Literal["info", "warn", "error"] = shows("info", "How bad it is.")
    message: str = shows("Step 3/30: training loss=0.4000", "For people.")
    type: Literal["message", "metrics"] = shows("metrics", "metrics for steps and evaluations.")
    data: dict[str, Any] = shows(
        {"kind": "step", "step": 3}, "As the events of /train, with `kind`."
    )


class TuningEventList(Page[TuningEvent]):
    """A page of events, the newest first."""


class CheckpointList(Page[Any]):
    """Always empty."""


def tuning_of(asked: Asked) -> dict[str, Any]:
    """What a job stores of a body, beside what it trains."""
    body = asked.body
    return {
        "type": asked.type,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "suffix": body.suffix,
        "metadata": body.metadata,
    }


def tuning_job(record: JobRecord) -> TuningJob:
    """A job as OpenAI's `fine_tuning.job`."""
    tuning = record.tuning or _NO_TUNING
    succeeded = record.state == "succeeded"
    return TuningJob(
        id=record.id,
        model=record.job.base_name,
        created_at=record.created_at,
        finished_at=record.finished_at,
        fine_tuned_model=record.adapter if succeeded else None,
        status=record.state,
        training_file=tuning.get("training_file", ""),
        validation_file=tuning.get("validation_file"),
        hyperparameters=_values(record.job),
        method=_method(record.job, tuning.get("type", record.method)),
        trained_tokens=(record.metrics or {}).get("num_tokens") if succeeded else None,
        error=_error(record),
        seed=record.job.hyperparameters.seed,
        user_provided_suffix=tuning.get("suffix"),
        metadata=tuning.get("metadata"),
    )


def _values(job: TrainingJob) -> TuningValues:
    options, recipe = job.hyperparameters, RECIPES[job.peft_type].hyperparameters
    return TuningValues(
        n_epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate_multiplier=options.learning_rate / recipe.learning_rate,
    )


def _method(job: TrainingJob, type_: str) -> dict[str, Any]:
    values = _values(job).model_dump()
    if type_ == SUPERVISED:
        # The fields that OpenAI's own clients know, and may check.
        return {"type": type_, type_: {"hyperparameters": values}}
    block = job.model_dump(mode="json", include=set(_BLOCK))
    block["config"] = {
        name: value for name, value in block["config"].items() if name not in _LONG_CONFIG
    }
    options = {**job.hyperparameters.model_dump(mode="json"), **values}
    return {"type": type_, type_: {"hyperparameters": options, **block}}


def _error(record: JobRecord) -> TuningError | None:
    if record.error is None:
        return None
    param = "training_file" if record.error["code"] == "data_invalid" else None
    return TuningError(**record.error, param=param)


# --- events --------------------------------------------------------------------------------------


def event_id(job_id: str, number: int) -> str:
    """The id of a job's event; `event_number` is its inverse."""
    return f"ftevent-{job_id}-{number}"


def event_number(job_id: str, given: str) -> int | None:
    """Which of a job's events an id means; None where it is no event of it."""
    digits = given.removeprefix(f"ftevent-{job_id}-")
    if len(digits) > 18 or not digits.isascii() or not digits.isdigit():
        return None
    return int(digits)


def tuning_event(job_id: str, event: JobEvent) -> TuningEvent:
    """An event as OpenAI's `fine_tuning.job.event`; `data` is ours, and has its kind."""
    state = event.data.get("state")
    level: Literal["info", "warn", "error"] = "info"
    if state == "failed":
        level = "error"
    elif (
        state == "cancelled"
        or event.kind in ("worker_lost", "interrupted")
        or event.data.keys() & {"warning", "warnings"}
    ):
        level = "warn"
    return TuningEvent(
        id=event_id(job_id, event.id),
        created_at=event.at,
        level=level,
        message=_message(event),
        type="metrics" if event.kind in ("step", "evaluation") else "message",
        data={"kind": event.kind, **event.data},
    )


def _message(event: JobEvent) -> str:
    if event.kind == "state":
        return _STATES[event.data["state"]](event.data)
    message = _KINDS.get(event.kind)
    return event.kind if message is None else message(event.data)


_STATES: dict[str, Callable[[dict[str, Any]], str]] = {
    "queued": lambda data: ". ".join(["The job waits for a worker", *data.get("warnings", ())]),
    "running": lambda data: f"A worker has the job (attempt {data['attempt']})",
    "succeeded": lambda data: (
        f"The job succeeded: version {data.get('adapter_version')} is served"
        + (f"; it is {data['warning']}" if data.get("warning") else "")
    ),
    "failed": lambda data: f"The job failed: {data.get('error', {}).get('message', '')}",
    "cancelled": lambda data: "The job was cancelled",
}
_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "started": lambda data: (
        f"Training {data['trainable_params']} parameters on {data['num_rows']} rows, "
        f"{data['num_held_out']} held out, {data['max_steps']} steps"
    ),
    "resumed": lambda data: f"Training goes on after step {data['step']} of {data['max_steps']}",
    "step": lambda data: (
        f"Step {data['step']}/{data['max_steps']}: training loss={data['loss']:.4f}"
    ),
    "evaluation": lambda data: f"Step {data['step']}: validation loss={data['loss']:.4f}",
    "checkpoint": lambda data: f"A checkpoint was written after step {data['step']}",
    "interrupted": lambda _data: "The server that trained the job ended; it goes on first of all",
    "worker_lost": lambda data: "The worker was lost; another one goes on",
}
