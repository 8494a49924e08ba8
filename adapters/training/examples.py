"""Turns the rows of a job into training and validation examples within the maximum length.

All randomness comes from the job's seeds, so the server, the worker and the command line produce the
same examples. Independent of tensors and models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.errors import DataInvalid
from adapters.training.encoding import Encoder
from adapters.training.job import TrainingJob
from adapters.training.rendering import ADDED, Example, Renderer
from adapters.training.rows import Row
from adapters.training.selection import split, without_context

__all__ = ["Example", "Examples", "fit", "kept_tokens", "make_examples"]


@dataclass(frozen=True)
class Examples:
    """The examples of a job.

    Attributes:
        train: training examples, in row order.
        held_out: validation examples, in row order; empty without a validation split.
        label_ids: every label as a target (separator, label, end of sequence), in the order of the
            job's labels; None without labels.
    """

    train: list[Example]
    held_out: list[Example]
    label_ids: list[tuple[int, ...]] | None


def make_examples(job: TrainingJob, rows: Sequence[Row], encoder: Encoder) -> Examples:
    """Encode, split and fit the rows of a job.

    Raises:
        TemplateInvalid: the job's template does not parse.
        JobInvalid: a label without tokens, a tokenizer without end of sequence, a split that holds
            out nothing, or no row left to train on.
        DataInvalid: a row lacks a column, its target is not among the labels, or it is too long.
    """
    renderer = Renderer(job, encoder)
    train, held_out = split(job, renderer.examples(rows))
    if job.train_on_context is False:
        train = without_context(job, train)
    return fit(job, Examples(train, held_out, renderer.label_ids()))


def fit(job: TrainingJob, examples: Examples) -> Examples:
    """Enforce the job's `max_length`, truncating prompts from the left where the job allows it.

    A held-out example must also fit the longest label, since every label is ranked after its prompt.

    Raises:
        DataInvalid: an example is too long and truncation is off, or its target alone is too long.
    """
    longest = max((len(ids) for ids in examples.label_ids or ()), default=0)
    return replace(
        examples,
        train=[_fitted(job, example, 0) for example in examples.train],
        held_out=[_fitted(job, example, longest) for example in examples.held_out],
    )


def kept_tokens(prompt_types: Sequence[int], room: int) -> list[int]:
    """Indices of the prompt tokens that fit in `room`: leading special tokens, then the last tokens."""
    count = len(prompt_types)
    if count <= room:
        return list(range(count))
    first = next((i for i, kind in enumerate(prompt_types) if kind != ADDED), count)
    first = min(first, room)
    return [*range(first), *range(count - (room - first), count)]


def _fitted(job: TrainingJob, example: Example, longest_label: int) -> Example:
    answer = max(len(example.target_ids), longest_label)
    num_prompt = len(example.prompt_ids)
    if num_prompt + answer <= job.max_length:
        return example
    prompt_types = example.types[:num_prompt]
    room = job.max_length - answer
    if job.on_too_long == "error":
        raise _too_long(job, example, answer, "on_too_long='truncate' drops the prompt's beginning")
    if room <= sum(kind == ADDED for kind in prompt_types):
        raise _too_long(
            job, example, answer, "the target is kept whole and leaves the prompt no room"
        )
    kept = kept_tokens(prompt_types, room)
    return replace(
        example,
        prompt_ids=tuple(example.prompt_ids[i] for i in kept),
        types=tuple(prompt_types[i] for i in kept) + example.types[num_prompt:],
    )


def _too_long(job: TrainingJob, example: Example, answer: int, hint: str) -> DataInvalid:
    num_prompt = len(example.prompt_ids)
    longest = " (the longest label)" if answer > len(example.target_ids) else ""
    return DataInvalid(
        f"row {example.row}: {num_prompt} tokens of prompt and {answer} of target{longest} are more "
        f"than max_length, {job.max_length}; {hint}",
        row=example.row,
        expected=f"at most {job.max_length} tokens",
        came=f"{num_prompt + answer} tokens",
    )
