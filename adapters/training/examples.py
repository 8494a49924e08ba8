"""The examples of a job: fitted to the maximum length, written beside the job, and read by its worker.

Independent of templates, tensors and models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from adapters.checkpoint.limits import MIB
from adapters.errors import DataInvalid, TrainingError
from adapters.training.job import OnTooLong, TrainingJob
from adapters.training.rendering import ADDED, LABEL, Example

__all__ = ["Example", "Examples", "fit", "from_lines", "kept_tokens", "to_lines"]

_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
# Bounds of a line: the labels' ids; an example's other fields; an id with its comma and its type.
_MAX_HEAD_BYTES = 512 * MIB
_LINE_BYTES = 200
_TOKEN_BYTES = 16


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


def fit(examples: Examples, max_length: int, on_too_long: OnTooLong) -> Examples:
    """Enforce a maximum of tokens of prompt and target, with "truncate" by cutting prompts on the left.

    A held-out example must also fit the longest label, since every label is ranked after its prompt.

    Raises:
        DataInvalid: an example is too long and truncation is off, or its target alone is too long.
    """
    longest = max((len(ids) for ids in examples.label_ids or ()), default=0)
    return replace(
        examples,
        train=[_fitted(one, 0, max_length, on_too_long) for one in examples.train],
        held_out=[_fitted(one, longest, max_length, on_too_long) for one in examples.held_out],
    )


def kept_tokens(prompt_types: Sequence[int], room: int) -> list[int]:
    """Indices of the prompt tokens that fit in `room`: leading special tokens, then the last tokens."""
    count = len(prompt_types)
    if count <= room:
        return list(range(count))
    first = next((i for i, kind in enumerate(prompt_types) if kind != ADDED), count)
    first = min(first, room)
    return [*range(first), *range(count - (room - first), count)]


def _fitted(
    example: Example, longest_label: int, max_length: int, on_too_long: OnTooLong
) -> Example:
    answer = max(len(example.target_ids), longest_label)
    num_prompt = len(example.prompt_ids)
    if num_prompt + answer <= max_length:
        return example
    prompt_types = example.types[:num_prompt]
    room = max_length - answer
    hint = None
    if on_too_long == "error":
        hint = "on_too_long='truncate' drops the prompt's beginning"
    elif room <= sum(kind == ADDED for kind in prompt_types):
        hint = "the target is kept whole and leaves the prompt no room"
    if hint is not None:
        longest = " (the longest label)" if answer > len(example.target_ids) else ""
        raise DataInvalid(
            f"row {example.row}: {num_prompt} tokens of prompt and {answer} of target{longest} are more "
            f"than max_length, {max_length}; {hint}",
            row=example.row,
            expected=f"at most {max_length} tokens",
            came=f"{num_prompt + answer} tokens",
        )
    kept = kept_tokens(prompt_types, room)
    return replace(
        example,
        prompt_ids=tuple(example.prompt_ids[i] for i in kept),
        types=tuple(prompt_types[i] for i in kept) + example.types[num_prompt:],
    )


# --- as a file ---------------------------------------------------------------------------------


class _Head(BaseModel):
    """The first line: the sizes of both parts, and the labels."""

    model_config = ConfigDict(extra="forbid", strict=True)

    num_train: Annotated[int, Field(ge=1)]
    num_held_out: Annotated[int, Field(ge=0)]
    label_ids: list[_Ids] | None


class _Line(BaseModel):
    """One example: ids of prompt and target, and a digit for the type of each; those of 4 are target."""

    model_config = ConfigDict(extra="forbid", strict=True)

    row: Annotated[int, Field(ge=1)]
    label: Annotated[int, Field(ge=0)] | None
    ids: _Ids
    types: Annotated[str, Field(pattern=r"\A[0-3]+4+\z")]


def to_lines(examples: Examples) -> Iterator[str]:
    """The examples as lines of JSON: a head, then one line an example."""
    head = _Head(
        num_train=len(examples.train),
        num_held_out=len(examples.held_out),
        label_ids=None if examples.label_ids is None else [[*ids] for ids in examples.label_ids],
    )
    yield head.model_dump_json() + "\n"
    for one in (*examples.train, *examples.held_out):
        types = "".join(map(str, one.types))
        ids = [*one.prompt_ids, *one.target_ids]
        yield json.dumps({"row": one.row, "label": one.label, "ids": ids, "types": types}) + "\n"


def from_lines(file: BinaryIO, job: TrainingJob) -> Examples:
    """Read what `to_lines` wrote of a job's examples.

    Raises:
        TrainingError: the file holds anything else, or more than the job can have.
    """
    try:
        head = _Head.model_validate_json(_line(file, _MAX_HEAD_BYTES))
        _require(
            head.num_train + head.num_held_out <= job.num_rows, "it has more rows than the job"
        )
        _require(len(head.label_ids or ()) == len(job.labels or ()), "it has other labels")
        most = _LINE_BYTES + _TOKEN_BYTES * job.max_length
        found = [
            _example(_line(file, most), job) for _ in range(head.num_train + head.num_held_out)
        ]
        _require(not file.read(1), "it goes on after its last row")
    except ValueError as error:  # pydantic's as well
        raise TrainingError(f"the job's tokenized rows are damaged: {error}") from error
    label_ids = None if head.label_ids is None else [tuple(ids) for ids in head.label_ids]
    return Examples(found[: head.num_train], found[head.num_train :], label_ids)


def _line(file: BinaryIO, max_bytes: int) -> bytes:
    line = file.readline(max_bytes + 1)
    _require(line.endswith(b"\n") and len(line) <= max_bytes, "a line is missing, cut or too long")
    return line


def _example(line: bytes, job: TrainingJob) -> Example:
    one = _Line.model_validate_json(line)
    count, num_prompt = len(one.ids), one.types.index(str(LABEL))
    _require(count == len(one.types) <= job.max_length, f"row {one.row} has {count} tokens")
    _require(one.label is None or one.label < len(job.labels or ()), f"row {one.row}: its label")
    types = tuple(map(int, one.types))
    return Example(
        tuple(one.ids[:num_prompt]), tuple(one.ids[num_prompt:]), one.label, one.row, types
    )


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)
