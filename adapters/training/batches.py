"""Assigns examples to steps as a pure function of the seed and the step number.

A resumed run therefore sees the same rows as an uninterrupted one, and no order is stored.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from adapters.training.job import Hyperparameters


@dataclass(frozen=True)
class Steps:
    """The steps of a run.

    Attributes:
        num_examples: training rows.
        batch_size: rows per forward pass; the last of an epoch may have fewer.
        accumulation: forward passes per optimiser step; the last of an epoch may have fewer.
        max_steps: total optimiser steps.
        seed: seed of the row order.
    """

    num_examples: int
    batch_size: int
    accumulation: int
    max_steps: int
    seed: int

    @classmethod
    def of(cls, num_examples: int, options: Hyperparameters) -> Steps:
        """The steps for a number of rows.

        Raises:
            ValueError: there is no row.
        """
        if num_examples < 1:
            raise ValueError("there is no row to train on")
        step_rows = options.batch_size * options.gradient_accumulation_steps
        an_epoch = math.ceil(num_examples / step_rows)
        steps = options.max_steps or an_epoch * (options.epochs or 1)
        return cls(
            num_examples,
            options.batch_size,
            options.gradient_accumulation_steps,
            steps,
            options.seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per pass over the rows."""
        return math.ceil(self.num_examples / (self.batch_size * self.accumulation))

    def epoch_of(self, step: int) -> int:
        """The epoch, from 1, of a step, from 0."""
        return step // self.steps_per_epoch + 1

    def ends_epoch(self, step: int) -> bool:
        """Whether this step, from 0, completes an epoch or the run."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.max_steps

    def batches(self, step: int) -> list[Sequence[int]]:
        """The forward passes of a step, from 0: row numbers of each."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.num_examples, self.seed, epoch)
        step_rows = self.batch_size * self.accumulation
        rows = order[within * step_rows : (within + 1) * step_rows]
        return [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]


@lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311  (no secret)
    return tuple(order)


def learning_rate(step: int, max_steps: int, options: Hyperparameters) -> float:
    """The rate of a step, from 0.

    Linear warm-up from 0, then linear or half-cosine decay to 0 at `max_steps`, or constant. The values
    equal those of transformers' schedules of the same names.
    """
    warmup = math.ceil(options.warmup_ratio * max_steps)
    if step < warmup:
        return options.learning_rate * step / warmup
    if options.lr_scheduler_type == "constant":
        return options.learning_rate
    done = (step - warmup) / max(1, max_steps - warmup)
    if options.lr_scheduler_type == "cosine":
        return options.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return options.learning_rate * (1.0 - done)
