"""Virtual tokens in training: a module computes their rows, which are prepended to the input.

Shared by prefix tuning, P-tuning, CPT and prompt tuning; each method defines the meaning of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from adapters.methods.soft_prompt import VirtualTokens, export_rows
from adapters.parts import KVPrefix, SoftPrompt
from adapters.trainable import FrozenBase, VirtualTargets


class TrainableRows:
    """Virtual tokens that a module computes.

    Args:
        module: computes the rows, (n, width).
        form: converts the rows to virtual tokens.
        targets: see `Trainable`.
    """

    def __init__(
        self,
        module: VirtualTokens,
        form: Callable[[torch.Tensor], KVPrefix | SoftPrompt],
        targets: VirtualTargets | None = None,
    ) -> None:
        self.module = module
        self.targets = targets
        self._form = form
        count = module.embedding.num_embeddings
        self._indices = torch.arange(count, device=module.embedding.weight.device)[None]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The module's parameters, see `Trainable.parameters`."""
        named = self.module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def virtual(self) -> KVPrefix | SoftPrompt:
        """The virtual tokens, differentiable, see `Trainable.virtual`."""
        return self._form(self.module(self._indices)[0])

    def set_training(self, training: bool) -> None:
        """Switch the module's dropout, see `Trainable.set_training`."""
        self.module.train(training)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint as it stands, by `soft_prompt.export_rows`."""
        return export_rows(self.module)

    def detach(self) -> None:
        """No-op: nothing is attached to the base."""


def trainable_soft_prompt(
    module: VirtualTokens,
    frozen: FrozenBase,
    init_token_ids: Sequence[int] | None = None,
    targets: VirtualTargets | None = None,
) -> TrainableRows:
    """Rows of embeddings, on the base's device.

    Args:
        module: computes the rows, (n, d).
        frozen: the base.
        init_token_ids: n tokens whose embeddings initialise the rows; None keeps the module's rows.
        targets: see `Trainable`.

    Raises:
        ValueError: the rows are computed by a network, or there are not n tokens.
    """
    if init_token_ids is not None:
        module.load_prompt_embeddings(frozen.embed(init_token_ids))
    module.to(frozen.model.get_input_embeddings().weight.device)  # type: ignore[operator]
    return TrainableRows(module, SoftPrompt, targets)


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Number of parameters of a module, built without allocating them."""
    with torch.device("meta"):
        module = build()
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
