"""How a training run shows itself on standard error: a bar in a terminal, lines elsewhere.

Takes the events of `adapters.training.loop`; knows nothing else of the run.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from adapters.training.loop import TrainingEvent

# Between two lines about steps.
LINE_SECONDS = 5.0


def evaluation_text(data: dict[str, Any]) -> str:
    """An evaluation as a line of text."""
    parts = [f"loss {data['loss']:.3f}"]
    if "accuracy" in data:
        parts += [f"accuracy {data['accuracy']:.3f}", f"macro-F1 {data['macro_f1']:.3f}"]
    return f"{', '.join(parts)} ({data['num_rows']} rows held out)"


def step_text(data: dict[str, Any]) -> str:
    """A step's figures as a line of text."""
    return (
        f"loss {data['loss']:.3f}  lr {data['learning_rate']:.2e}  "
        f"{data['tokens_per_second']:.0f} tokens/s  {_duration(data['seconds_left'])} left"
    )


def life_text(kind: str, data: dict[str, Any]) -> str | None:
    """What happens to the worker of a job as a line of text; None for other events."""
    if kind == "state" and data["state"] == "queued":
        return "waiting for a worker"
    if kind == "state" and data["state"] == "running":
        nice = f" at niceness {data['nice']}" if "nice" in data else ""
        return f"a worker starts{nice}, and reads the base"
    if kind == "worker_lost":
        return f"the worker was lost ({data['how']}); another one goes on"
    if kind == "interrupted":
        return "interrupted: its server ended; the job goes on once a server runs"
    return None


class TrainingProgress:
    """Shows events; a context manager.

    Args:
        console: where to; a bar if it is a terminal.
        line_seconds: between two lines about steps, at least; the first step is always shown.
    """

    def __init__(self, console: Console, *, line_seconds: float = LINE_SECONDS) -> None:
        self._console = console
        self._line_seconds = line_seconds
        self._printed_at = -line_seconds
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("training", total=None, figures="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: TrainingEvent) -> None:
        """Show an event."""
        data = event.data
        if line := life_text(event.kind, data):
            self._print(line)
        elif event.kind == "step":
            self._step(data)
        elif event.kind == "evaluation":
            self._print(f"epoch {data['epoch']}, step {data['step']}: {evaluation_text(data)}")
        elif event.kind in ("started", "resumed"):
            again = f"going on from step {data['step']}: " if event.kind == "resumed" else ""
            self._print(
                f"{again}training {data['trainable_params']:,} parameters on {data['num_rows']} rows, "
                f"{data['num_held_out']} held out, {data['max_steps']} steps"
            )
            if self._bar:
                done = data.get("step", 0)
                self._bar.update(self._task, total=data["max_steps"], completed=done)

    def _step(self, data: dict[str, Any]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=data["step"], figures=step_text(data))
        elif time.monotonic() - self._printed_at >= self._line_seconds:
            self._printed_at = time.monotonic()
            self._print(f"step {data['step']}/{data['max_steps']}  {step_text(data)}")

    def _print(self, line: str) -> None:
        console = self._bar.console if self._bar else self._console
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
