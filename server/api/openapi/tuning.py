"""Replies of `/v1/files` and `/v1/fine_tuning/jobs`. Documentation only."""

from __future__ import annotations

from typing import Any, Literal

from server.api.openapi.fields import Reply, shows
from server.store.job_states import State

_FILE = "file-0123456789abcdef01234567"
_JOB = "job-a1ab28fe4d34fda420b6c479"
_EVENT = f"ftevent-{_JOB}-7"


class File(Reply):
    """OpenAI's `file`."""

    id: str = shows(_FILE, "The file.")
    object: Literal["file"] = shows("file", "What this is.")
    bytes: int = shows(10240, "How long it is.")
    created_at: int = shows(1795376932, "Unix time, seconds.")
    expires_at: None = shows(None, "Always null: files are kept until they are deleted.")
    filename: str = shows("rows.jsonl", "As the client called it.")
    purpose: str = shows("fine-tune", "What it is for.")
    status: str = shows("processed", "Always processed; a job checks the lines.")
    status_details: None = shows(None, "Always null.")


class FileDeleted(Reply):
    """A file that is gone."""

    id: str = shows(_FILE, "The file.")
    object: Literal["file"] = shows("file", "What this was.")
    deleted: bool = shows(True, "Always true.")


class _Page(Reply):
    object: Literal["list"] = shows("list", "What this is.")
    first_id: str | None = shows(_JOB, "Id of the first one here.")
    last_id: str | None = shows(_JOB, "Id of the last one here, for `after`.")
    has_more: bool = shows(False, "Whether there are more behind it.")


class FileList(_Page):
    """A page of files."""

    data: list[File] = shows([], "The files.")


class Three(Reply):
    """OpenAI's hyperparameters, resolved."""

    n_epochs: int | None = shows(3, "Passes over the data; null where max_steps was given.")
    batch_size: int = shows(8, "Rows a forward pass.")
    learning_rate_multiplier: float = shows(1.0, "Times the learning rate of the recipe.")


class TuningError(Reply):
    """Why a job failed."""

    code: str = shows("training_diverged", "For programs; the README lists them.")
    message: str = shows("the loss of step 3 is nan", "For people.")
    param: str | None = shows(None, "training_file, where that was at fault.")


class TuningJob(Reply):
    """OpenAI's `fine_tuning.job`."""

    object: Literal["fine_tuning.job"] = shows("fine_tuning.job", "What this is.")
    id: str = shows(_JOB, "The job, here and under /train.")
    model: str = shows("SmolLM2-135M-Instruct", "The base.")
    created_at: int = shows(1795376932, "Unix time, seconds.")
    finished_at: int | None = shows(None, "Likewise; null until it has ended.")
    estimated_finish: None = shows(None, "Always null; events of /train tell the seconds left.")
    fine_tuned_model: str | None = shows("complaints", "The adapter, once it has succeeded.")
    organization_id: str = shows("graftwork", "Always graftwork.")
    result_files: list[str] = shows([], "Always empty.")
    status: State = shows("succeeded", "How it stands.")
    training_file: str = shows(_FILE, "The file; empty for a job of /train.")
    validation_file: str | None = shows(None, "The file with rows held out.")
    hyperparameters: Three = shows({}, "OpenAI's, resolved.")
    method: dict[str, Any] = shows(
        {"type": "ia3", "ia3": {"hyperparameters": {}}}, "The method with everything resolved."
    )
    trained_tokens: int | None = shows(12771, "Of prompts and answers, over all steps.")
    error: TuningError | None = shows(None, "Why it failed.")
    seed: int = shows(0, "Of weights, order and dropout.")
    integrations: list[Any] = shows([], "Always empty.")
    user_provided_suffix: str | None = shows("complaints", "As it was given.")
    metadata: dict[str, str] | None = shows({"team": "support"}, "As it was given.")


class TuningJobList(_Page):
    """A page of jobs, the newest first."""

    data: list[TuningJob] = shows([], "The jobs.")


class TuningEvent(Reply):
    """OpenAI's `fine_tuning.job.event`."""

    object: Literal["fine_tuning.job.event"] = shows("fine_tuning.job.event", "What this is.")
    id: str = shows(_EVENT, "The event.")
    created_at: int = shows(1795376932, "Unix time, seconds.")
    level: Literal["info", "warn", "error"] = shows("info", "How bad it is.")
    message: str = shows("Step 3/30: training loss=0.4000", "For people.")
    type: Literal["message", "metrics"] = shows("metrics", "metrics for steps and evaluations.")
    data: dict[str, Any] = shows(
        {"kind": "step", "step": 3}, "As the events of /train, with `kind`."
    )


class TuningEventList(_Page):
    """A page of events, the newest first."""

    data: list[TuningEvent] = shows([], "The events.")


class CheckpointList(_Page):
    """Always empty."""

    data: list[Any] = shows([], "Nothing.")
