"""The training loop: a job and its examples in, a checkpoint in PEFT's format out.

    for each step: batches -> loss -> gradients -> clip -> optimiser -> event

The base stays frozen and in eval mode. Trained parameters and optimiser state are float32. A run
resumes automatically from the checkpoint it finds, see `state`. Independent of processes and the jobs
table; the only file it uses is its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.checkpoint.folder import write_checkpoint
from adapters.errors import BaseMismatch, NonFinite, TrainingDiverged
from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.parts import KVPrefix, SoftPrompt
from adapters.trainable import Trainable
from adapters.training.batches import Steps, learning_rate
from adapters.training.examples import Example, Examples
from adapters.training.job import Hyperparameters, TrainingJob
from adapters.training.objective import num_targets, summed_loss
from adapters.training.packed import PackedBase
from adapters.training.ranking import commonest_share, mean_loss, rank, score
from adapters.training.state import (
    RunState,
    load,
    optimizer_tensors,
    restore_optimizer,
    save,
)

# Where no rows are held out, so many training rows are ranked at the end, spread over all of them.
_RANKED_TRAINING_ROWS = 64
_MAX_RANKED_LABELS = 50

EventKind = Literal["started", "resumed", "step", "evaluation", "checkpoint"]


class Stopped(Exception):
    """Training was stopped by `should_stop`; a checkpoint was saved if there is a state directory."""


@dataclass(frozen=True)
class TrainingEvent:
    """A progress event of a run.

    Attributes:
        kind: "started" or "resumed" opens a run; "step" follows each optimiser step, "evaluation"
            each epoch with held-out rows, "checkpoint" each save.
        data: JSON.
            started: max_steps, num_rows, num_held_out, trainable_params; resumed: also step.
            step: step, max_steps, epoch, loss, learning_rate, tokens_per_second, seconds_left.
            evaluation: step, epoch, loss, num_rows, and with labels accuracy, macro_f1 and
            commonest_share, the accuracy of always answering the commonest label.
            checkpoint: step.
    """

    kind: EventKind
    data: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """The result of a run.

    Attributes:
        config: `adapter_config.json`.
        tensors: the checkpoint, PEFT's names, float32.
        metrics: loss (mean over the last epoch), steps, epochs, num_rows, num_tokens (of prompts and
            targets, over all steps), and with held-out rows `evaluation`, measured on the parameters
            that are kept. With labels and no held-out rows `on_training_rows` has the same for some of
            the training rows. `warning` says where an adapter is no better than always answering the
            commonest label. Identical for a run that was interrupted and resumed.
    """

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    metrics: dict[str, Any]

    def write(self, directory: Path) -> None:
        """Write the checkpoint folder. Raises as `checkpoint.write_checkpoint`."""
        write_checkpoint(directory, self.config, self.tensors)


def train(
    job: TrainingJob,
    examples: Examples,
    model: nn.Module,
    base: BaseModelSpec,
    *,
    on_event: Callable[[TrainingEvent], None],
    state_dir: Path | None = None,
    checkpoint_seconds: float = 20.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Run a job to completion.

    Args:
        job: the job.
        examples: its examples.
        model: the loaded base, frozen and in eval mode; its attention is replaced, and IA3 wraps its
            modules for the duration of the run.
        base: its dimensions.
        on_event: called in this thread.
        state_dir: directory of the checkpoint, read on resume; None disables checkpoints.
        checkpoint_seconds: time between two checkpoints; 0 saves after every step.
        should_stop: called before every forward pass.

    Raises:
        BaseMismatch: the job was planned for another base.
        TrainingDiverged: a training or evaluation loss, or a final parameter, is not finite.
        Stopped: requested by `should_stop`.
        StorageFull: no space for a checkpoint.
        TrainingError: the existing checkpoint is damaged.
    """
    if job.base_digest != base.digest:
        raise BaseMismatch(
            f"the job was planned for the base {job.base_digest[:12]}, came {base.digest[:12]}",
            field="base_digest",
            expected=job.base_digest,
            came=base.digest,
        )
    with torch.random.fork_rng(devices=[]):
        run = _Run(job, examples, PackedBase(model, base), on_event, state_dir, should_stop)
        try:
            return run.to_the_end(checkpoint_seconds)
        finally:
            run.trainable.detach()


class _Run:
    """One run in progress."""

    def __init__(
        self,
        job: TrainingJob,
        examples: Examples,
        base: PackedBase,
        on_event: Callable[[TrainingEvent], None],
        state_dir: Path | None,
        should_stop: Callable[[], bool],
    ) -> None:
        self._job = job
        self._options = job.hyperparameters
        self._examples = examples
        self._base = base
        self._on_event = on_event
        self._state_dir = state_dir
        self._should_stop = should_stop
        self._plan = Steps.of(len(examples.train), self._options)
        torch.manual_seed(self._options.seed)
        method = METHODS[job.peft_type]
        config = parse_config(method.config_class, job.config)
        self.trainable: Trainable = method.trainable(config, base, job.init_token_ids)
        self._parameters = self.trainable.parameters()
        self._optimizer = make_optimizer(self._parameters, self._options)
        self._step = 0
        self._best: dict[str, torch.Tensor] = {}
        # Run state that the result depends on besides the tensors; stored with every checkpoint.
        self._facts: dict[str, Any] = {
            "losses": [],
            "evaluations": [],
            "since_best": 0,
            "num_tokens": 0,
        }
        self._clock = _Clock(self._plan)

    def to_the_end(self, checkpoint_seconds: float) -> Trained:
        """Run all remaining steps."""
        self._begin()
        saved_at = time.monotonic()
        while self._step < self._plan.max_steps and not self._is_over():
            if self._should_stop():
                self._save()
                raise Stopped
            loss, num_tokens = self._one_step()
            self._note(loss, num_tokens)
            if self._plan.ends_epoch(self._step - 1):
                self._end_epoch()
            if self._state_dir and time.monotonic() - saved_at >= checkpoint_seconds:
                self._save()
                saved_at = time.monotonic()
        return self._trained()

    # --- a step ------------------------------------------------------------------------

    def _one_step(self) -> tuple[float, int]:
        """Forward and backward passes of a step, then the optimiser. Returns loss and token count."""
        train, targets = self._examples.train, self.trainable.targets
        batches = [[train[row] for row in rows] for rows in self._plan.batches(self._step)]
        count = sum(num_targets(batch, targets) for batch in batches)
        rate = learning_rate(self._step, self._plan.max_steps, self._options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        self.trainable.set_training(True)
        total = 0.0
        for batch in batches:
            self._stop_if_asked()
            virtual = self.trainable.virtual()
            loss = summed_loss(self._base, virtual, batch, targets) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        self._check_finite(total, f"step {self._step + 1}")
        if self._options.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters.values(), self._options.max_grad_norm)
        self._optimizer.step()
        self._step += 1
        tokens = sum(len(e.prompt_ids) + len(e.target_ids) for batch in batches for e in batch)
        return total, tokens

    def _check_finite(self, loss: float, where: str) -> None:
        if math.isfinite(loss):
            return
        rate = self._options.learning_rate
        raise TrainingDiverged(
            f"the loss of {where} is {loss}; a learning rate below {rate:.3g} may help",
            field="hyperparameters.learning_rate",
            expected="a finite loss",
            came=str(loss),
        )

    def _note(self, loss: float, num_tokens: int) -> None:
        self._facts["num_tokens"] += num_tokens
        self._facts["losses"].append(loss)
        del self._facts["losses"][: -self._plan.steps_per_epoch]
        per_second, seconds_left = self._clock.after(self._step, num_tokens)
        rate = learning_rate(self._step - 1, self._plan.max_steps, self._options)
        self._emit(
            "step",
            step=self._step,
            max_steps=self._plan.max_steps,
            epoch=self._plan.epoch_of(self._step - 1),
            loss=loss,
            learning_rate=rate,
            tokens_per_second=per_second,
            seconds_left=seconds_left,
        )

    # --- evaluation --------------------------------------------------------------------

    def _end_epoch(self) -> None:
        if not self._examples.held_out:
            return
        self.trainable.set_training(False)
        result = {
            "step": self._step,
            "epoch": self._plan.epoch_of(self._step - 1),
            **self._evaluate(),
        }
        self._emit("evaluation", **result)
        evaluations = self._facts["evaluations"]
        if self._options.early_stopping_patience is not None:
            if all(_goodness(result) > _goodness(earlier) for earlier in evaluations):
                self._best = {name: p.detach().clone() for name, p in self._parameters.items()}
                self._facts["best"] = result
                self._facts["since_best"] = 0
            else:
                self._facts["since_best"] += 1
        evaluations.append(result)

    def _evaluate(self) -> dict[str, Any]:
        held_out = self._examples.held_out
        with torch.no_grad():
            virtual = self._base.fold(self.trainable.virtual())
        loss = mean_loss(self._base, virtual, held_out, self._stop_if_asked)
        self._check_finite(loss, f"the evaluation after step {self._step}")
        return {"loss": loss, **self._ranked(held_out, virtual, self._stop_if_asked)}

    def _ranked(
        self,
        examples: Sequence[Example],
        virtual: KVPrefix | SoftPrompt | None,
        should_stop: Callable[[], None],
    ) -> dict[str, Any]:
        """The number of rows, and with labels how many are right."""
        label_ids = self._examples.label_ids
        if label_ids is None:
            return {"num_rows": len(examples)}
        prompts = [example.prompt_ids for example in examples]
        scores = rank(self._base, virtual, prompts, label_ids, should_stop)
        chosen = scores.argmax(dim=1).tolist()
        right = [example.label for example in examples if example.label is not None]
        found = score(chosen, right)
        return {
            "num_rows": len(examples),
            "accuracy": found.accuracy,
            "macro_f1": found.macro_f1,
            "commonest_share": commonest_share(right),
        }

    def _rank_training_rows(self) -> dict[str, Any] | None:
        """How many of some training rows are right, where no rows are held out."""
        train, label_ids = self._examples.train, self._examples.label_ids
        if self._facts["evaluations"] or label_ids is None or len(label_ids) > _MAX_RANKED_LABELS:
            return None
        stride = -(-len(train) // _RANKED_TRAINING_ROWS)
        self.trainable.set_training(False)
        with torch.no_grad():
            virtual = self._base.fold(self.trainable.virtual())
            # After the last step there is nothing to stop for.
            return self._ranked(train[::stride], virtual, lambda: None)

    def _is_over(self) -> bool:
        patience = self._options.early_stopping_patience
        return patience is not None and self._facts["since_best"] >= patience

    # --- beginning and end -------------------------------------------------------------

    def _begin(self) -> None:
        facts = {
            "max_steps": self._plan.max_steps,
            "num_rows": len(self._examples.train),
            "num_held_out": len(self._examples.held_out),
            "trainable_params": sum(p.numel() for p in self._parameters.values()),
        }
        state = load(self._state_dir) if self._state_dir else None
        if state is None:
            self._emit("started", **facts)
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.parameters[name])
        restore_optimizer(self._optimizer, state.optimizer)
        torch.set_rng_state(state.generator)
        self._step, self._best = state.step, state.best
        self._facts |= state.facts
        self._clock.begin(self._step)
        self._emit("resumed", step=self._step, **facts)

    def _stop_if_asked(self) -> None:
        # Inside a step or an evaluation: nothing is saved, and the run resumes from the last
        # checkpoint.
        if self._should_stop():
            raise Stopped

    def _save(self) -> None:
        if self._state_dir is None:
            return
        state = RunState(
            step=self._step,
            parameters={name: p.detach() for name, p in self._parameters.items()},
            optimizer=optimizer_tensors(self._optimizer),
            generator=torch.get_rng_state(),
            best=self._best,
            facts=self._facts,
        )
        save(self._state_dir, state)
        self._emit("checkpoint", step=self._step)

    def _trained(self) -> Trained:
        if self._best:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._best[name])
        try:
            tensors = self.trainable.tensors()
        except NonFinite as error:
            raise TrainingDiverged(f"training ended without finite numbers: {error}") from error
        evaluations = self._facts["evaluations"]
        if not evaluations:
            self._check_last_step()
        losses = self._facts["losses"]
        metrics: dict[str, Any] = {
            "loss": sum(losses) / len(losses),
            "steps": self._step,
            "epochs": self._plan.epoch_of(self._step - 1),
            "num_rows": len(self._examples.train),
            "num_tokens": self._facts["num_tokens"],
        }
        if evaluations:
            metrics["evaluation"] = self._facts.get("best", evaluations[-1])
        elif (ranked := self._rank_training_rows()) is not None:
            metrics["on_training_rows"] = ranked
        if (warning := _no_better(metrics)) is not None:
            metrics["warning"] = warning
        return Trained(dict(self._job.config), tensors, metrics)

    def _check_last_step(self) -> None:
        """Run one forward pass with the final parameters: the last loss predates the last step."""
        rows = self._examples.train[: self._plan.batch_size]
        self.trainable.set_training(False)
        with torch.no_grad():
            loss = mean_loss(self._base, self.trainable.virtual(), rows)
        self._check_finite(loss, "the trained adapter")

    def _emit(self, kind: EventKind, **data: Any) -> None:
        self._on_event(TrainingEvent(kind, data))


def _no_better(metrics: dict[str, Any]) -> str | None:
    """A sentence, if the labels are ranked no better than by always answering the commonest."""
    kind = "held-out" if "evaluation" in metrics else "training"
    found = metrics.get("evaluation") or metrics.get("on_training_rows") or {}
    if "accuracy" not in found or found["accuracy"] > found["commonest_share"]:
        return None
    return (
        f"no better than always answering the commonest label: accuracy {found['accuracy']:.3f} on "
        f"{found['num_rows']} {kind} rows, of which {found['commonest_share']:.3f} have that label"
    )


class _Clock:
    """Throughput of a run since it started or resumed, and the estimated time left."""

    def __init__(self, plan: Steps) -> None:
        self._plan = plan
        self.begin(0)

    def begin(self, step: int) -> None:
        self._first = step
        self._tokens = 0
        self._started = time.monotonic()

    def after(self, step: int, num_tokens: int) -> tuple[float, float]:
        """(tokens per second, seconds left) after this step, counted from 1."""
        self._tokens += num_tokens
        seconds = max(time.monotonic() - self._started, 1e-9)
        left = (self._plan.max_steps - step) * seconds / (step - self._first)
        return self._tokens / seconds, left


def make_optimizer(
    parameters: dict[str, nn.Parameter], options: Hyperparameters
) -> torch.optim.Optimizer:
    """Build the optimiser for these parameters."""
    values = list(parameters.values())
    if options.optimizer == "sgd":
        return torch.optim.SGD(values, lr=options.learning_rate)
    return torch.optim.AdamW(
        values,
        lr=options.learning_rate,
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
    )


def _goodness(evaluation: dict[str, Any]) -> tuple[float, float]:
    """Sort key of an evaluation, higher is better: accuracy (if there are labels), then lower loss."""
    return evaluation.get("accuracy", 0.0), -evaluation["loss"]
