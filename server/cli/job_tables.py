"""How `graftwork jobs` shows jobs, as `GET /train` has them, to people. Prints nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from server.cli.found_adapters import RENDERING
from server.cli.render import cell, share

Job = Mapping[str, Any]

# What was asked for, and what follows from the data; the rest is the job's course.
_SETTINGS = (
    "adapter",
    "method",
    *RENDERING,
    "max_length",
    "on_too_long",
    "init_text",
    "context_examples",
    "context_seed",
    "train_on_context",
    "base_name",
    "base_digest",
    "num_rows",
    "num_validation_rows",
    "trainable_params",
)
_NESTED = ("hyperparameters", "config")
# Of `jobs_table`: what a narrow terminal does without, the first ones first.
EXPENDABLE = ("created", "method", "accuracy", "time", "step", "loss")
# Columns of a comparison stay beside one another, whatever a job's longest value is.
_WIDEST_VALUE = 60
# Of a config: long, or the same thing said again.
_LEFT_OUT = frozenset({"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "peft_type"})


def jobs_table(jobs: Sequence[Job]) -> Table:
    """Jobs, one a line."""
    columns = ("state", "adapter", "method", "step", "loss", "accuracy", "time", "created")
    # Ids and names are copied from here: never folded.
    whole = {"state", "adapter"}
    named = [Column(one, no_wrap=one in whole, overflow="fold") for one in columns]
    identity = Column("id", no_wrap=True, overflow="fold")
    table = Table(identity, *named, box=box.SIMPLE_HEAD, pad_edge=False)
    for job in jobs:
        created = f"{job['created_at'][:19].replace('T', ' ')} UTC"
        cells = (job["id"], _state(job), job["adapter"], job["method"], _step(job))
        figures = (_loss(job), share(_accuracy(job)), duration_of(job), created)
        table.add_row(*(Text(one) for one in (*cells, *figures)))
    return table


def comparison_of(jobs: Sequence[Job]) -> dict[str, Any]:
    """What jobs differ in: `jobs` (ids), `settings` and `metrics` (name -> a value for each job)."""
    settings = [dict(_settings(job)) for job in jobs]
    results = [dict(_results(job)) for job in jobs]
    names = dict.fromkeys(name for one in settings for name in one)
    measured = dict.fromkeys(name for one in results for name in one)
    values = {name: [one.get(name) for one in settings] for name in names}
    return {
        "jobs": [job["id"] for job in jobs],
        "settings": {name: each for name, each in values.items() if not _all_equal(each)},
        "metrics": {name: [one.get(name) for one in results] for name in measured},
    }


def comparison_table(compared: Mapping[str, Any]) -> Table:
    """A comparison with a column for each job."""
    columns = [
        Column(
            one, overflow="fold", max_width=_WIDEST_VALUE, min_width=min(len(one), _WIDEST_VALUE)
        )
        for one in compared["jobs"]
    ]
    table = Table("", *columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for part in ("settings", "metrics"):
        for name, values in compared[part].items():
            table.add_row(name, *(Text(_shown(one)) for one in values))
        table.add_section()
    return table


def duration_of(job: Job) -> str:
    """How long a job has run, or ran; empty before its start."""
    if not job["started_at"]:
        return ""
    ended, now = job["finished_at"], datetime.now(UTC)
    end = datetime.fromisoformat(ended) if ended else now
    seconds = (end - datetime.fromisoformat(job["started_at"])).total_seconds()
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _state(job: Job) -> str:
    return "interrupted" if job.get("interrupted") else str(job["state"])


def _step(job: Job) -> str:
    progress = job["progress"]
    return f"{progress['step']} of {progress['max_steps']}" if progress else ""


def _loss(job: Job) -> str:
    loss = (job["metrics"] or job["progress"] or {}).get("loss")
    return "" if loss is None else f"{loss:.4g}"


def _accuracy(job: Job) -> float | None:
    found: float | None = ((job["metrics"] or {}).get("evaluation") or {}).get("accuracy")
    return found


def _settings(job: Job) -> Iterator[tuple[str, Any]]:
    for name in _SETTINGS:
        yield name, job.get(name)
    for outer in _NESTED:
        for name, value in (job.get(outer) or {}).items():
            if name not in _LEFT_OUT:
                yield name, value


def _results(job: Job) -> Iterator[tuple[str, Any]]:
    yield "state", _state(job)
    yield "time", duration_of(job)
    for name, value in (job["metrics"] or {}).items():
        if isinstance(value, Mapping):
            yield from ((f"{name} {inner}", one) for inner, one in value.items())
        else:
            yield name, value


def _all_equal(values: Sequence[Any]) -> bool:
    texts = {json.dumps(one, sort_keys=True) for one in values}
    return len(texts) == 1


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else cell(value)
