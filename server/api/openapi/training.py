"""Replies of `/train`. Documentation only; the job's own fields are `TrainingJob`'s."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from adapters.training.job import HyperparameterRequest, Hyperparameters
from server.api.openapi.fields import Reply, may_show, shows
from server.store.job_states import State

_JOB = "job-a1ab28fe4d34fda420b6c479"


def _describe(schema: dict[str, Any]) -> None:
    for name, prop in schema["properties"].items():
        prop["description"] = HyperparameterRequest.model_fields[name].description


class Resolved(Hyperparameters):
    """The optimisation, every default resolved."""

    model_config = ConfigDict(json_schema_extra=_describe)


class Planned(Reply):
    """What will be done, with nothing left open."""

    adapter: str = shows("mine", "The name under which it will be served.")
    method: str = shows("ia3", "The method.")
    peft_type: str = shows("IA3", "PEFT's name of it.")
    template: str = shows("Tweet text : {text} Label :", "Makes prompts of rows.")
    target: str = shows("label", "The column to answer.")
    labels: list[str] | None = shows(["complaint", "no complaint"], "All that may be answered.")
    target_separator: str = shows(" ", "Stands between prompt and target.")
    append_eos: bool = shows(True, "Whether targets end with the end of sequence.")
    tokenization: str = shows("boundary", "Where white space at the template's end goes.")
    max_length: int = shows(2048, "Tokens of prompt, target and end of sequence.")
    on_too_long: str = shows("error", "What is done with a longer row.")
    context_examples: int | None = shows(None, "CPT: examples in the context.")
    context_seed: int | None = shows(None, "CPT: which ones.")
    train_on_context: bool | None = shows(None, "CPT: whether they are trained on as well.")
    if_exists: str = shows("new_version", "What is done when the name has an adapter.")
    description: str | None = shows(None, "Free text about the adapter.")
    hyperparameters: Resolved = shows(
        Hyperparameters(learning_rate=0.01, epochs=3).model_dump(), "Every default resolved."
    )
    base_digest: str = shows("1a45f6bea123…", "The base that it is for.")
    base_name: str = shows("SmolLM2-135M-Instruct", "What that base is called.")
    num_rows: int = shows(80, "Rows, held-out ones included.")
    num_validation_rows: int = shows(0, "The last so many rows came to be held out.")
    prompts: str = shows("template", "template, or chat where the base's chat template made them.")
    trainable_params: int = shows(57600, "Numbers that are trained.")


class _Long(Reply):
    config: dict[str, Any] = shows({"peft_type": "IA3"}, "The complete adapter_config.json.")
    label_names: dict[str, str] | None = shows(None, "Values of the target in words.")
    init_text: str | None = shows(None, "What a prefix or a prompt starts from.")
    init_token_ids: list[int] | None = shows(None, "The same as ids.")


class JobError(Reply):
    """Why a job failed."""

    code: str = shows("training_diverged", "For programs; the README lists them.")
    message: str = shows("the loss of step 3 is nan", "For people.")


class ListedJob(Planned):
    """A job: what it does and how it stands."""

    id: str = shows(_JOB, "The job.")
    state: State = shows("running", "How it stands.")
    adapter_version: int | None = shows(None, "The version that came of it.")
    progress: dict[str, Any] = shows({"step": 3, "loss": 0.4}, "The newest step; empty before it.")
    metrics: dict[str, Any] | None = shows(None, "What was measured, once it has succeeded.")
    error: JobError | None = shows(None, "Why it failed.")
    cancel_requested: bool = shows(False, "Whether somebody wants it to end.")
    attempts: int = shows(1, "Workers that had it since its last checkpoint.")
    created_at: str = shows("2026-11-22T20:15:58+00:00", "When it was asked for.")
    started_at: str | None = shows("2026-11-22T20:16:01+00:00", "When a worker first had it.")
    finished_at: str | None = shows(None, "When it ended.")


class Job(_Long, ListedJob):
    """A job with its longer fields."""


class JobList(Reply):
    """Jobs."""

    jobs: list[ListedJob] = shows([], "The newest first, without the longer fields.")
    total: int = shows(1, "How many there are in all.")


class JobDeleted(Reply):
    """A job that is gone."""

    id: str = shows(_JOB, "The job.")
    deleted: bool = shows(True, "Always true.")


class PreviewRow(Reply):
    """A row as it would be trained on."""

    row: int = shows(1, "Counts from 1.")
    text: str = shows("Tweet text : late Label : complaint", "Prompt and target.")
    prompt: str = shows("Tweet text : late Label :", "What the template makes.")
    target: str = shows(" complaint", "What is to be answered, with its separator.")
    tokens: list[str | None] = shows(["Tweet", " text"], "Texts of the tokens; null without text.")
    ids: list[int] = shows([19161, 1694], "The tokens.")
    num_prompt_tokens: int = shows(6, "Tokens of the prompt.")
    num_target_tokens: int = shows(2, "Tokens of the target.")
    truncated: bool = shows(False, "Whether the prompt lost its beginning.")


class Lengths(Reply):
    """Tokens of prompt and target, over all rows."""

    min: int = shows(8, "The shortest row.")
    mean: float = shows(21.5, "The mean.")
    max: int = shows(60, "The longest row.")


class Preview(_Long, Planned):
    """A dry run: what would be done, and three rows of it."""

    num_train: int = shows(64, "Rows to train on.")
    num_held_out: int = shows(16, "Rows held out.")
    lengths: Lengths = shows({}, "How long the rows are.")
    preview: list[PreviewRow] = shows([], "The first rows of training.")


class JobEvent(Reply):
    """The data of one event of a job's stream; which fields it has follows from its name."""

    at: str = shows("2026-11-22T20:16:04+00:00", "When it happened.")
    state: State | None = may_show("running", "Of state.")
    step: int | None = may_show(3, "Of step, evaluation, checkpoint and resumed.")
    max_steps: int | None = may_show(30, "Of step, started and resumed.")
    epoch: int | None = may_show(1, "Of step and evaluation.")
    loss: float | None = may_show(0.4, "Of step and evaluation.")
    learning_rate: float | None = may_show(0.01, "Of step.")
    tokens_per_second: float | None = may_show(540.0, "Of step.")
    seconds_left: float | None = may_show(12.5, "Of step.")
    num_rows: int | None = may_show(64, "Of started, resumed and evaluation.")
    num_held_out: int | None = may_show(16, "Of started and resumed.")
    trainable_params: int | None = may_show(57600, "Of started and resumed.")
    accuracy: float | None = may_show(0.8, "Of evaluation, with labels.")
    macro_f1: float | None = may_show(0.79, "Of evaluation, with labels.")
    attempt: int | None = may_show(1, "Of state, when a worker has it.")
    error: JobError | None = may_show(None, "Of state, when it failed.")
    adapter_version: int | None = may_show(1, "Of state, when it succeeded.")
    how: str | None = may_show("it was killed", "Of worker_lost.")
