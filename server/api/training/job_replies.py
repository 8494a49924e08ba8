"""Replies and events of `/train`. Knows no route."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from adapters.training.job import HyperparameterRequest, Hyperparameters
from server.api.reply_fields import Moment, ReplyModel, fixed, may_show, shows
from server.store.job_states import State
from server.store.jobs import JobRecord

if TYPE_CHECKING:
    from adapters.training.plan import Plan
    from server.api.training.training_data import DataFacts

_JOB = "job-a1ab28fe4d34fda420b6c479"
EXAMPLE_EVENTS = (
    'id: 3\nevent: step\ndata: {"step": 1, "max_steps": 30, "epoch": 1, "loss": 1.9, '
    '"learning_rate": 0.0, "tokens_per_second": 540.0, "seconds_left": 12.5, '
    '"at": "2026-11-22T20:16:04+00:00"}\n\n'
)


def _describe(schema: dict[str, Any]) -> None:
    for name, prop in schema["properties"].items():
        prop["description"] = HyperparameterRequest.model_fields[name].description


class Resolved(Hyperparameters):
    """The optimisation, every default resolved."""

    model_config = ConfigDict(json_schema_extra=_describe)


class Planned(ReplyModel):
    """What will be done, with nothing left open."""

    adapter: str = shows("mine", "The name under which it will be served.")
    method: str = shows("ia3", "The method.")
    peft_type: str = shows("IA3", "PEFT's name of it.")
    config: dict[str, Any] = shows({"peft_type": "IA3"}, "The complete adapter_config.json.")
    template: str = shows("Tweet text : {text} Label :", "Makes prompts of rows.")
    target: str = shows("label", "The column to answer.")
    labels: list[str] | None = shows(["complaint", "no complaint"], "All that may be answered.")
    label_names: dict[str, str] | None = shows(None, "Labels by the target's values.")
    target_separator: str = shows(" ", "Stands between prompt and target.")
    append_eos: bool = shows(True, "Whether targets end with the end of sequence.")
    tokenization: str = shows("boundary", "Where white space at the template's end goes.")
    max_length: int = shows(2048, "Tokens of prompt, target and end of sequence.")
    on_too_long: str = shows("error", "What is done with a longer row.")
    init_text: str | None = shows(None, "What a prefix or a prompt starts from.")
    init_token_ids: list[int] | None = shows(None, "The same as ids.")
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
    num_validation_rows: int = shows(0, "Rows that are held out.")
    format: str = shows("columns", "The shape of the rows.")
    labels_inferred: bool = shows(False, "Whether the labels are the values of the target column.")
    warnings: list[str] = shows([], "What was found in the data that may not be intended.")
    prompts: str = shows("template", "template, or chat where the base's chat template made them.")
    trainable_params: int = shows(57600, "Numbers that are trained.")


class JobError(ReplyModel):
    """Why a job failed."""

    code: str = shows("training_diverged", "For programs; the documentation lists them.")
    message: str = shows("the loss of step 3 is nan", "For people.")


class JobIdentity(ReplyModel):
    """Which job it is, and its state."""

    id: str = shows(_JOB, "The job.")
    state: State = shows("running", "How it stands.")


class JobProgress(ReplyModel):
    """What a job has done so far."""

    adapter_version: int | None = shows(None, "The version that came of it.")
    progress: dict[str, Any] = shows({"step": 3, "loss": 0.4}, "The newest step; empty before it.")
    metrics: dict[str, Any] | None = shows(None, "What was measured, once it has succeeded.")
    error: JobError | None = shows(None, "Why it failed.")
    cancel_requested: bool = shows(False, "Whether its cancellation was requested.")
    attempts: int = shows(1, "Workers that had it since its last checkpoint.")
    interrupted: bool = shows(
        False,
        "Whether it runs by its state and has no worker: it is claimed next, before all others.",
    )
    waits_for: str | None = may_show(
        "a server of the base SmolLM2-135M-Instruct (1a45f6bea123); this one serves 9d0c52ab7f31",
        "Why this server leaves the job in the queue, where it is for another base.",
    )
    created_at: Moment = shows("2026-11-22T20:15:58+00:00", "When it was requested.")
    started_at: Moment | None = shows("2026-11-22T20:16:01+00:00", "When a worker first had it.")
    finished_at: Moment | None = shows(None, "When it ended.")


class Job(JobProgress, Planned, JobIdentity):
    """A job: what it does and how it stands."""

    @classmethod
    def of(cls, record: JobRecord, served: str | None = None) -> Self:
        """A record of the jobs table, as a server of the base with the digest `served` reports it."""
        parts = (JobIdentity.model_validate(record), JobProgress.model_validate(record))
        known = {name: value for part in parts for name, value in part}
        known["waits_for"] = _waits_for(record, served)
        return cls(**known, **record.job.model_dump())


def _waits_for(record: JobRecord, served: str | None) -> str | None:
    needed = record.job.base_digest
    is_waiting = record.state == "queued" or record.interrupted
    if not is_waiting or served in (None, needed):
        return None
    name = record.job.base_name
    return f"a server of the base {name} ({needed[:12]}); this one serves {str(served)[:12]}"


class ListedJob(Job):
    """A job without its longer fields: a config with a context in it is long."""

    config: SkipJsonSchema[dict[str, Any]] = Field(exclude=True)
    label_names: SkipJsonSchema[dict[str, str] | None] = Field(exclude=True)
    init_text: SkipJsonSchema[str | None] = Field(exclude=True)
    init_token_ids: SkipJsonSchema[list[int] | None] = Field(exclude=True)


class JobList(ReplyModel):
    """Jobs."""

    jobs: list[ListedJob] = shows([], "The newest first, without the longer fields.")
    total: int = shows(1, "How many there are in all.")


class JobDeleted(ReplyModel):
    """A job that is gone."""

    id: str = shows(_JOB, "The job.")
    deleted: bool = fixed(True, "Always true.")


class PreviewRow(ReplyModel):
    """A row as it would be trained on."""

    row: int = shows(1, "Counts from 1.")
    text: str = shows("Tweet text : late Label : complaint", "Prompt and target.")
    prompt: str = shows("Tweet text : late Label :", "What the template makes.")
    target: str = shows(" complaint", "What is to be answered, with its separator.")
    tokens: list[str | None] = shows(
        ["Tweet", " text"],
        "Texts of the tokens; null without text; bytes as \\xe6 where a token is part of a character.",
    )
    ids: list[int] = shows([19161, 1694], "The tokens.")
    num_prompt_tokens: int = shows(6, "Tokens of the prompt.")
    num_target_tokens: int = shows(2, "Tokens of the target.")
    truncated: bool = shows(False, "Whether the prompt lost its beginning.")


class Lengths(ReplyModel):
    """Tokens of prompt and target, over all rows."""

    min: int = shows(8, "The shortest row.")
    mean: float = shows(21.5, "The mean.")
    max: int = shows(60, "The longest row.")


class UnderstoodData(ReplyModel):
    """What was understood of the data."""

    format: str = shows("columns", "The shape of the rows.")
    layout: str = shows("CSV", "JSON lines, JSON array, JSON objects, CSV, or rows in the request.")
    encoding: str | None = shows("UTF-8", "The encoding of the file.")
    separator: str | None = shows("comma", "What separates the cells of CSV.")
    columns_used: list[str] = shows(["text", "label"], "Columns that make prompts and targets.")
    columns_unused: list[str] = shows(["id"], "Columns that are not read.")


class PreviewOfRows(ReplyModel):
    """What a dry run says of the rows."""

    data: UnderstoodData = shows({}, "How the rows were read.")

    num_train: int = shows(64, "Rows to train on.")
    num_held_out: int = shows(16, "Rows held out.")
    lengths: Lengths = shows({}, "How long the rows are.")
    preview: list[PreviewRow] = shows([], "The first rows of training.")


class Preview(PreviewOfRows, Planned):
    """A dry run: what would be done, and three rows of it."""

    @classmethod
    def of(cls, plan: Plan, facts: DataFacts) -> Self:
        """A plan, its first rows, and what was understood of its data."""
        return cls(
            **plan.job.model_dump(),
            data=UnderstoodData.model_validate(facts, from_attributes=True),
            num_train=len(plan.examples.train),
            num_held_out=len(plan.examples.held_out),
            lengths=plan.lengths,
            preview=plan.preview,
        )


class JobEventData(ReplyModel):
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
    commonest_share: float | None = may_show(
        0.5, "Of evaluation, with labels: the accuracy of always answering the commonest one."
    )
    warning: str | None = may_show(
        None, "Of state, when it succeeded no better than by always answering the commonest label."
    )
    warnings: list[str] | None = may_show(
        None, "Of state, when it is queued: what was found in the data that may not be intended."
    )
    nice: int | None = may_show(19, "Of state, when a worker has it: the niceness of its process.")
    how: str | None = may_show("it was killed", "Of worker_lost.")
