"""What a training run shows, in a terminal and in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from adapters.training.loop import TrainingEvent
from server.cli.training_progress import TrainingProgress, step_text

STARTED = {"max_steps": 4, "num_rows": 8, "num_held_out": 2, "trainable_params": 12345}
EVALUATION = {"step": 2, "epoch": 1, "loss": 0.5, "accuracy": 0.5, "macro_f1": 1 / 3, "num_rows": 2}


def step(number: int) -> dict:
    return {
        "step": number,
        "max_steps": 4,
        "epoch": 1,
        "loss": 0.25 * number,
        "learning_rate": 0.01,
        "tokens_per_second": 310.4,
        "seconds_left": 3725.0,
    }


def shown(console: Console, first: TrainingEvent) -> str:
    with TrainingProgress(console, line_seconds=1e9) as progress:
        progress(first)
        for number in (1, 2, 3, 4):
            progress(TrainingEvent("step", step(number)))
            if number == 2:
                progress(TrainingEvent("evaluation", EVALUATION))
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_matters_is_shown(terminal):
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    text = shown(console, TrainingEvent("started", STARTED))
    assert "training 12,345 parameters on 8 rows, 2 held out, 4 steps" in text
    assert "epoch 1, step 2: loss 0.500, accuracy 0.500, macro-F1 0.333 (2 rows held out)" in text
    assert step_text(step(4)) == "loss 1.000  lr 1.00e-02  310 tokens/s  1:02:05 left"
    # A terminal ends with the last step; lines come no oftener than they may.
    assert (step_text(step(4)) in text) == terminal
    assert ("4/4" in text) == terminal
    assert ("step 1/4" in text) == (not terminal)


def test_a_job_says_that_a_worker_has_it_and_what_became_of_one():
    console = Console(file=io.StringIO(), width=120)
    with TrainingProgress(console) as progress:
        for kind, data in (
            ("state", {"state": "queued"}),
            ("state", {"state": "running", "attempt": 1, "nice": 19}),
            ("worker_lost", {"how": "signal SIGSEGV"}),
            ("interrupted", {}),
            ("state", {"state": "succeeded", "adapter_version": 1}),
        ):
            progress(TrainingEvent(kind, data))
    assert console.file.getvalue().splitlines() == [
        "waiting for a worker",
        "a worker starts at niceness 19, and reads the base",
        "the worker was lost (signal SIGSEGV); another one goes on",
        "interrupted: its server ended; the job goes on once a server runs",
    ]


def test_a_resumed_run_says_from_where():
    console = Console(file=io.StringIO(), width=120)
    text = shown(console, TrainingEvent("resumed", {**STARTED, "step": 2}))
    assert "going on from step 2: training 12,345 parameters on 8 rows" in text
