"""Training jobs and their events in OpenAI's words.

A job that `/train` made is told in the same words: it has no files, and the method's own name as its
type. Knows no store and no route.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from adapters.training.job import TrainingJob
from adapters.training.recipes import RECIPES
from server.api.training.openai.body import SUPERVISED, Asked
from server.store.jobs import JobEvent, JobRecord

ORGANIZATION = "graftwork"
_NO_TUNING: dict[str, Any] = {}
# What of a job a method's block says.
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


def tuning_of(asked: Asked) -> dict[str, Any]:
    """What of a body a job keeps, beside what it trains."""
    body = asked.body
    return {
        "type": asked.type,
        "training_file": body.training_file,
        "validation_file": body.validation_file,
        "suffix": body.suffix,
        "metadata": body.metadata,
    }


def job_object(record: JobRecord) -> dict[str, Any]:
    """A job as OpenAI's `fine_tuning.job`."""
    tuning = record.tuning or _NO_TUNING
    succeeded = record.state == "succeeded"
    return {
        "object": "fine_tuning.job",
        "id": record.id,
        "model": record.job.base_name,
        "created_at": _unix(record.created_at),
        "finished_at": _unix(record.finished_at),
        "estimated_finish": None,
        "fine_tuned_model": record.adapter if succeeded else None,
        "organization_id": ORGANIZATION,
        "result_files": [],
        "status": record.state,
        "training_file": tuning.get("training_file", ""),
        "validation_file": tuning.get("validation_file"),
        "hyperparameters": _three(record.job),
        "method": _method(record.job, tuning.get("type", record.method)),
        "trained_tokens": (record.metrics or {}).get("num_tokens") if succeeded else None,
        "error": _error(record),
        "seed": record.job.hyperparameters.seed,
        "integrations": [],
        "user_provided_suffix": tuning.get("suffix"),
        "metadata": tuning.get("metadata"),
    }


def _three(job: TrainingJob) -> dict[str, Any]:
    """OpenAI's hyperparameters, resolved; no epochs where the steps were given."""
    options, recipe = job.hyperparameters, RECIPES[job.peft_type].hyperparameters
    return {
        "n_epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate_multiplier": options.learning_rate / recipe.learning_rate,
    }


def _method(job: TrainingJob, type_: str) -> dict[str, Any]:
    said = job.model_dump(mode="json", include=set(_BLOCK))
    said["config"] = {
        name: value for name, value in said["config"].items() if name not in _LONG_CONFIG
    }
    options = {**job.hyperparameters.model_dump(mode="json"), **_three(job)}
    if type_ == SUPERVISED:
        # What OpenAI's own clients know, and may check.
        return {"type": type_, type_: {"hyperparameters": _three(job)}}
    return {"type": type_, type_: {"hyperparameters": options, **said}}


def _error(record: JobRecord) -> dict[str, Any] | None:
    if record.error is None:
        return None
    param = "training_file" if record.error["code"] == "data_invalid" else None
    return {**record.error, "param": param}


def _unix(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp())


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


def event_object(job_id: str, event: JobEvent) -> dict[str, Any]:
    """An event as OpenAI's `fine_tuning.job.event`; `data` is ours, and says its kind."""
    state = event.data.get("state")
    level = "info"
    if state == "failed":
        level = "error"
    elif state == "cancelled" or event.kind == "worker_lost":
        level = "warn"
    return {
        "object": "fine_tuning.job.event",
        "id": event_id(job_id, event.id),
        "created_at": int(event.at.timestamp()),
        "level": level,
        "message": _message(event),
        "type": "metrics" if event.kind in ("step", "evaluation") else "message",
        "data": {"kind": event.kind, **event.data},
    }


def _message(event: JobEvent) -> str:
    if event.kind == "state":
        return _STATES[event.data["state"]](event.data)
    tell = _KINDS.get(event.kind)
    return event.kind if tell is None else tell(event.data)


_STATES: dict[str, Callable[[dict[str, Any]], str]] = {
    "queued": lambda data: "The job waits for a worker",
    "running": lambda data: f"A worker has the job (attempt {data['attempt']})",
    "succeeded": lambda data: f"The job succeeded: version {data.get('adapter_version')} is served",
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
    "worker_lost": lambda data: "The worker was lost; another one goes on",
}
