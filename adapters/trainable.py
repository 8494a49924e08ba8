"""Interfaces for training: the parameters of one adapter, and their effect on the base.

Interfaces only: virtual tokens implement them in `trainable_rows`, IA3 in its own file. Independent of
optimisers, data and methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapters.base_model import BaseModelSpec
from adapters.parts import KVPrefix, SoftPrompt

if TYPE_CHECKING:
    import torch
    from torch import nn


class FrozenBase(Protocol):
    """The base, as used by a method to initialise its weights.

    Attributes:
        model: the loaded causal language model; its weights are never changed.
        spec: its dimensions.
    """

    model: nn.Module
    spec: BaseModelSpec

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The base's embeddings of these tokens, (n, d), float32."""
        ...

    def keys_values(self, token_ids: Sequence[int]) -> KVPrefix:
        """The base's own keys and values of these tokens at positions 0 to n - 1, float32."""
        ...


@dataclass(frozen=True)
class VirtualTargets:
    """Virtual tokens that are predicted themselves (CPT's labels).

    Attributes:
        token_ids: (n,), target token id at each virtual token.
        weights: (n,), float32, loss weight of each target.
        counts: (n,), bool, whether it counts in the average.
    """

    token_ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor


class Trainable(Protocol):
    """An adapter that is being trained, attached to a base.

    Attributes:
        targets: virtual tokens that are predicted, or None.
    """

    targets: VirtualTargets | None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, float32, by name, in a fixed order."""
        ...

    def virtual(self) -> KVPrefix | SoftPrompt | None:
        """The virtual tokens before every row of the step, differentiable; None if there are none."""
        ...

    def set_training(self, training: bool) -> None:
        """Switch dropout in the adapter on or off; the base never has any."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint as it stands, PEFT's names, float32."""
        ...

    def detach(self) -> None:
        """Restore the base to its original state."""
        ...
