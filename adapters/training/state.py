"""Checkpoints of a run: all state that the remaining steps depend on, in one file.

Stored: parameters, optimiser moments, torch's generator state, the step, and the best parameters so
far. Row order and learning rate are functions of the step and not stored. A killed run that resumes
from here gives bit-identical results at the same number of threads.

    [ SHA-256 of the rest | safetensors, the facts among them as JSON ]

A new file replaces the previous one by rename, so a complete one always exists; the digest detects
corruption. Independent of models and methods.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from adapters import synced_files
from adapters.errors import TrainingError

STATE_FILE = "state.bin"

_PARAMETER = "parameter/"
_BEST = "best/"
_OPTIMIZER = "optimizer/"
_GENERATOR = "generator"
_FACTS = "facts"
_DIGEST_BYTES = 32


@dataclass
class RunState:
    """State of a run between two steps.

    Attributes:
        step: steps done.
        parameters: name -> values, float32.
        optimizer: "<parameter index>/<torch's name of the moment>" -> values.
        generator: state of torch's global generator.
        best: the parameters of the best evaluation so far, if tracked.
        facts: the loop's own state; JSON.
    """

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    generator: torch.Tensor
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def save(directory: Path, state: RunState) -> None:
    """Write a checkpoint, replacing the previous one.

    Raises:
        StorageFull: the disk is full; the previous checkpoint is unchanged.
    """
    facts = json.dumps({"step": state.step, "facts": state.facts}).encode()
    tensors = {
        _GENERATOR: state.generator,
        _FACTS: torch.frombuffer(bytearray(facts), dtype=torch.uint8),
    }
    groups = (
        (_PARAMETER, state.parameters),
        (_BEST, state.best),
        (_OPTIMIZER, state.optimizer),
    )
    for prefix, group in groups:
        for name, tensor in group.items():
            tensors[prefix + name] = tensor.detach().cpu().contiguous()
    data = safetensors.torch.save(tensors)
    data = hashlib.sha256(data).digest() + data
    with synced_files.full_disk_is_storage_full("the training checkpoint"):
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{STATE_FILE}"
        temporary.unlink(missing_ok=True)
        try:
            synced_files.write_file(temporary, data)
            temporary.rename(directory / STATE_FILE)
            synced_files.sync(directory)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def load(directory: Path) -> RunState | None:
    """The last checkpoint, or None if there is none.

    Raises:
        TrainingError: the file is damaged.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        return None
    data = path.read_bytes()
    digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        raise TrainingError(
            f"the training checkpoint {path.name} is damaged: its bytes are not those written"
        )
    tensors = safetensors.torch.load(data)
    said = json.loads(bytes(tensors[_FACTS].tolist()))
    return RunState(
        step=said["step"],
        parameters=_under(_PARAMETER, tensors),
        optimizer=_under(_OPTIMIZER, tensors),
        generator=tensors[_GENERATOR],
        best=_under(_BEST, tensors),
        facts=said["facts"],
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The moments of an optimiser, by parameter index and torch's name."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}/{name}": torch.as_tensor(value)
        for number, moments in state.items()
        for name, value in moments.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the moments of an optimiser."""
    whole = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**whole, "state": state})


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
