"""Selects examples for training, for validation and for CPT's context.

All draws use the request's seeds: the same rows and seeds give the same examples.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapters.errors import JobInvalid
from adapters.training.job import Hyperparameters
from adapters.training.rendering import Example


@dataclass(frozen=True)
class ContextSettings:
    """Which examples are in CPT's context; the fields are those of `TrainingJob`."""

    context_examples: int | None
    context_seed: int | None
    train_on_context: bool | None


def split(
    examples: Sequence[Example], options: Hyperparameters, num_validation_rows: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples, each in row order.

    With labels the split is stratified, and every label keeps at least one training example.

    Args:
        examples: all of them.
        options: the share to hold out, and the seed.
        num_validation_rows: hold out so many at the end instead, and draw nothing; 0 draws.

    Raises:
        JobInvalid: the split is nonzero but would hold out nothing.
    """
    if num_validation_rows:
        first = len(examples) - num_validation_rows
        return list(examples[:first]), list(examples[first:])
    share = options.validation_split
    if share == 0.0:
        return list(examples), []
    groups = list(by_label(examples).values())
    shuffled = random.Random(options.seed)  # noqa: S311 (a draw, not a secret)
    for group in groups:
        shuffled.shuffle(group)
    counts = _shares([len(group) for group in groups], share)
    held_out = {
        example.row
        for group, count in zip(groups, counts, strict=True)
        for example in group[:count]
    }
    if not held_out:
        raise JobInvalid(
            f"hyperparameters.validation_split: {share} of {len(examples)} rows holds out nothing "
            "(every label keeps a row to train on)",
            field="hyperparameters.validation_split",
            expected="a share that holds out at least one row",
            came=str(share),
        )
    return (
        [example for example in examples if example.row not in held_out],
        [example for example in examples if example.row in held_out],
    )


def by_label(examples: Iterable[Example]) -> dict[int | None, list[Example]]:
    """Group examples by label, labels in order; one group under None without labels."""
    groups: dict[int | None, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.label, []).append(example)
    return dict(sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0]))


def alternating(groups: Iterable[Sequence[Example]]) -> list[Example]:
    """Interleave the groups round-robin until all are exhausted."""
    queues = [list(group) for group in groups]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def context_of(train: Sequence[Example], context: ContextSettings) -> list[Example]:
    """Draw the examples of CPT's context by `context_seed`, with labels alternating.

    Raises:
        JobInvalid: the context needs more examples than there are.
    """
    count = context.context_examples or 0
    if count > len(train):
        raise JobInvalid(
            f"context_examples is {count}, but there are {len(train)} rows to choose from",
            field="context_examples",
            expected=f"at most {len(train)}",
            came=str(count),
        )
    draw = random.Random(context.context_seed or 0)  # noqa: S311
    groups = list(by_label(train).values())
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)
    return alternating(groups)[:count]


def without_context(train: Sequence[Example], context: ContextSettings) -> list[Example]:
    """The examples that are not in CPT's context.

    Raises:
        JobInvalid: no example is left.
    """
    shown = {example.row for example in context_of(train, context)}
    left = [example for example in train if example.row not in shown]
    if not left:
        raise JobInvalid(
            f"train_on_context is false, and the context takes all {len(train)} rows",
            field="train_on_context",
            expected="true, or fewer context_examples than rows",
            came="false",
        )
    return left


def _shares(sizes: Sequence[int], share: float) -> list[int]:
    """Number of held-out examples per group: its rounded share, keeping at least one to train on.

    The total is the share of all rows, unless small groups cannot contribute theirs.
    """
    exact = [size * share for size in sizes]
    counts = [min(int(want), size - 1) for want, size in zip(exact, sizes, strict=True)]
    wanted = round(sum(sizes) * share)
    # Largest remainder: groups that lost most by rounding down give one more; label order breaks ties.
    for index in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i]):
        if sum(counts) < wanted and counts[index] < sizes[index] - 1:
            counts[index] += 1
    return counts
