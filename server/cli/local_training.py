"""A training run in this process: rows in, a PEFT folder out, no server and no jobs table.

    DIR.partial/    while it runs and after it was interrupted
        run.json    the job and a digest of its rows: only the same run may go on from here
        state/      the last checkpoint, see `adapters.training.state`
        adapter/    the finished folder, for the moment before it becomes DIR
    DIR             the finished folder; it appears whole

Knows the folder and the signal that ends a run. What it prints is the command's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from adapters import synced_files
from adapters.errors import TrainingError
from adapters.template import Row
from adapters.training.batches import Steps
from adapters.training.job import TrainingJob
from adapters.training.loop import Trained, TrainingEvent, train
from adapters.training.plan import Plan
from adapters.training.provenance import Provenance
from server.base.load import LoadedBase

CHECKPOINT_SECONDS = 20.0
_RUN_FILE = "run.json"


class PartialRun:
    """The folder of a run that is not finished.

    Args:
        directory: DIR.partial.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def check(self, *, resume: bool) -> None:
        """Compare the disk with what the command wants; reads no file.

        Raises:
            TrainingError: a run to resume is not there, or one is there and resuming was not
                requested.
        """
        there = (self.directory / _RUN_FILE).is_file()
        if resume and not there:
            raise TrainingError(
                f"{self.directory} holds no run to resume",
                expected="the folder of an interrupted run",
                came="none",
            )
        if not resume and self.directory.exists():
            raise TrainingError(
                f"{self.directory} is there, as an interrupted run leaves it: go on with --resume, or "
                "remove it to begin anew",
                expected="no such folder, or --resume",
                came="the folder",
            )

    def begin(self, job: TrainingJob, rows: Sequence[Row]) -> None:
        """Make the folder, or make sure that it is this run's.

        Raises:
            TrainingError: it is that of another job, or of other rows.
            StorageFull: the disk took no more.
        """
        described = {"job": job.model_dump(mode="json"), "rows": _digest(rows)}
        path = self.directory / _RUN_FILE
        if not path.is_file():
            with synced_files.full_disk_is_storage_full("the run"):
                self.directory.mkdir(parents=True, exist_ok=True)
                synced_files.write_file(path, json.dumps(described, indent=2).encode())
            return
        before = _read(path)
        if before != described:
            raise TrainingError(
                f"{self.directory} holds another run: {_difference(before, described)}; give the options "
                "and rows that it began with",
                expected="the same job and rows",
                came="others",
            )

    @property
    def state(self) -> Path:
        """Where checkpoints go."""
        return self.directory / "state"

    def finish(self, provenance: Provenance, trained: Trained, out: Path) -> None:
        """Make `out`, which is not there or empty, the finished folder.

        Raises:
            StorageFull: the disk took no more; the run can be resumed.
        """
        staged = self.directory / "adapter"
        shutil.rmtree(staged, ignore_errors=True)
        trained.write(staged)
        provenance.write(staged)
        synced_files.sync(staged)
        staged.rename(out)
        synced_files.sync(out.parent)

    def remove(self) -> None:
        """Take the folder away."""
        shutil.rmtree(self.directory, ignore_errors=True)


def check_out(out: Path) -> None:
    """Refuse a path that a finished folder cannot take.

    Raises:
        TrainingError: it is a file, or a folder that is not empty.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise TrainingError(
                f"{out} is not empty; expected a folder that is not there yet, or an empty one",
                field="out",
                expected="no such folder, or an empty one",
                came="a folder with files",
            )
    elif out.exists() or out.is_symlink():
        raise TrainingError(
            f"{out} is no folder; expected one that is not there yet, or an empty one",
            field="out",
            expected="no such folder, or an empty one",
            came="a file",
        )


def run(
    plan: Plan,
    base: LoadedBase,
    partial: PartialRun,
    on_event: Callable[[TrainingEvent], None],
    *,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Trained:
    """Train to the end, or until an interrupt: then a checkpoint is written.

    Must be called in the main thread. A second interrupt ends the run where it is.

    Raises:
        Stopped: interrupted; the checkpoint holds the last step.
        TrainingDiverged, TrainingError, StorageFull: see `adapters.training.loop.train`.
    """
    with _interrupts() as interrupted:
        leave = _LeaveAfterStep(plan, interrupted)

        def observe(event: TrainingEvent) -> None:
            leave.after(event)
            on_event(event)

        return train(
            plan.job,
            plan.examples,
            base.model,
            base.spec,
            on_event=observe,
            state_dir=partial.state,
            checkpoint_seconds=checkpoint_seconds,
            should_stop=leave,
        )


class _LeaveAfterStep:
    """Lets a run end between two steps only, where the loop writes a checkpoint before it ends.

    The loop calls it before every forward pass; the first time after a step, or after the evaluation
    that follows it, is where it may end.
    """

    def __init__(self, plan: Plan, interrupted: Callable[[], bool]) -> None:
        options = plan.job.hyperparameters
        self._steps = Steps.of(len(plan.examples.train), options)
        self._evaluates = bool(plan.examples.held_out)
        self._interrupted = interrupted
        self._between = False

    def after(self, event: TrainingEvent) -> None:
        """Note where the run is."""
        if event.kind == "step":
            ends_epoch = self._steps.ends_epoch(event.data["step"] - 1)
            self._between = not (self._evaluates and ends_epoch)
        elif event.kind != "checkpoint":
            self._between = True

    def __call__(self) -> bool:
        between, self._between = self._between, False
        return between and self._interrupted()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; the second one has its usual effect."""
    came = False
    former: dict[int, Any] = {}

    def note(number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(number, former[number])

    for each in (signal.SIGINT, signal.SIGTERM):
        former[each] = signal.signal(each, note)
    try:
        yield lambda: came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"job": dict(read["job"]), "rows": str(read["rows"])}
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is damaged: {error}; remove its folder") from error


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A sentence about the first thing in which two runs differ."""
    there = {**before["job"], **before["job"].get("hyperparameters", {})}
    here = {**now["job"], **now["job"]["hyperparameters"]}
    for name, value in here.items():
        if name != "hyperparameters" and there.get(name) != value:
            return f"{name} was {_short(there.get(name))}, came {_short(value)}"
    return "it has other rows"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def partial_of(out: Path) -> Path:
    """DIR.partial, beside DIR."""
    whole = Path(os.path.abspath(out))
    return whole.with_name(whole.name + ".partial")
