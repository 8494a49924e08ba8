"""Which rows stand in which step, and the learning rate of a step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import get_scheduler

from adapters.training.batches import Steps, learning_rate
from adapters.training.job import Hyperparameters


def options(**fields):
    return Hyperparameters(**{"learning_rate": 1e-2, "epochs": 3, **fields})


def rows_of(plan, step):
    return list(itertools.chain(*plan.batches(step)))


@pytest.mark.parametrize("num_examples", [1, 4, 10, 16, 17])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (4, 1), (2, 2), (3, 4), (64, 1)])
def test_an_epoch_is_every_row_once(num_examples, batch_size, accumulation):
    plan = Steps.of(
        num_examples, options(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    )
    an_epoch = math.ceil(num_examples / (batch_size * accumulation))
    assert (plan.steps_per_epoch, plan.max_steps) == (an_epoch, 3 * an_epoch)
    for epoch in range(3):
        steps = range(epoch * an_epoch, (epoch + 1) * an_epoch)
        seen = list(itertools.chain(*(rows_of(plan, step) for step in steps)))
        assert sorted(seen) == list(range(num_examples))
        assert {plan.epoch_of(step) for step in steps} == {epoch + 1}
        assert [plan.ends_epoch(step) for step in steps] == [False] * (an_epoch - 1) + [True]
    for step in range(plan.max_steps):
        batches = plan.batches(step)
        assert 1 <= len(batches) <= accumulation
        # Only the last forward pass of a step may have fewer rows, and none has no row.
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert 1 <= len(batches[-1]) <= batch_size


def test_the_order_follows_from_seed_and_step_alone():
    def order(seed):
        plan = Steps.of(30, options(batch_size=4, seed=seed))
        return [plan.batches(step) for step in range(plan.max_steps)]

    first = order(0)
    assert order(0) == first
    plan = Steps.of(30, options(batch_size=4, seed=0))
    backwards = [plan.batches(step) for step in reversed(range(plan.max_steps))]
    assert backwards[::-1] == first
    assert order(1) != first
    # Every epoch has an order of its own.
    assert first[:8] != first[8:16] != first[16:]


def test_splitting_a_step_into_forward_passes_changes_no_row():
    whole = Steps.of(21, options(batch_size=8))
    split = Steps.of(21, options(batch_size=2, gradient_accumulation_steps=4))
    assert whole.max_steps == split.max_steps
    for step in range(whole.max_steps):
        assert rows_of(whole, step) == rows_of(split, step)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_steps_may_end_amid_an_epoch(max_steps):
    plan = Steps.of(10, options(epochs=None, max_steps=max_steps, batch_size=4))
    assert plan.max_steps == max_steps
    assert [step for step in range(max_steps) if plan.ends_epoch(step)] == sorted(
        {step for step in range(max_steps) if (step + 1) % 3 == 0} | {max_steps - 1}
    )


def test_max_steps_goes_before_epochs():
    assert Steps.of(10, options(epochs=3, max_steps=2, batch_size=4)).max_steps == 2


def test_no_row_is_an_error():
    with pytest.raises(ValueError, match="no row"):
        Steps.of(0, options())


# transformers calls ours "constant_with_warmup"; its "constant" ignores the warm-up.
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("max_steps", [1, 2, 7, 40])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule, warmup_ratio, max_steps):
    chosen = options(warmup_ratio=warmup_ratio, lr_scheduler_type=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=chosen.learning_rate)
    warmup_steps = math.ceil(warmup_ratio * max_steps)
    theirs = get_scheduler(SCHEDULES[schedule], optimizer, warmup_steps, max_steps)
    for step in range(max_steps):
        (want,) = theirs.get_last_lr()
        assert learning_rate(step, max_steps, chosen) == pytest.approx(want, rel=1e-12, abs=1e-18)
        theirs.step()
