"""The loss of a step: cross entropy on the targets of its rows, computed on the packed base.

Averaged over the target tokens. Where virtual tokens are themselves targets (CPT's context), they are
computed once per step but weighted by the number of rows. Loss and gradients equal those of repeating
them before every row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from adapters.parts import KVPrefix, SoftPrompt
from adapters.trainable import VirtualTargets
from adapters.training.examples import Example
from adapters.training.packed import PackedBase, TokenRow, pack


def num_targets(examples: Sequence[Example], targets: VirtualTargets | None) -> int:
    """Target tokens of these rows; virtual tokens that are targets count once per row."""
    own = sum(len(example.target_ids) for example in examples)
    return own + (len(examples) * int(targets.counts.sum()) if targets is not None else 0)


def summed_loss(
    base: PackedBase,
    virtual: KVPrefix | SoftPrompt | None,
    examples: Sequence[Example],
    targets: VirtualTargets | None = None,
) -> torch.Tensor:
    """Cross entropy summed over the target tokens, a float32 scalar with gradients.

    Args:
        base: the frozen base.
        virtual: virtual tokens before the rows.
        examples: the rows; every prompt has at least one token.
        targets: virtual tokens that are predicted.
    """
    packed = pack([TokenRow((*example.prompt_ids, *example.target_ids)) for example in examples])
    at: list[int] = []
    ids: list[int] = []
    for start, example in zip(packed.starts, examples, strict=False):
        before = start + len(example.prompt_ids) - 1
        at += range(before, before + len(example.target_ids))
        ids += example.target_ids
    weights = torch.ones(len(ids))
    if targets is not None:
        places = targets.counts.nonzero()[:, 0]
        # Predicted from the preceding virtual token; indices start at -n, see `PackedBase.logits`.
        at += (places - 1 - len(targets.counts)).tolist()
        ids += targets.token_ids[places].tolist()
        weights = torch.cat((weights, targets.weights[places] * len(examples)))
    logits = base.logits(packed, virtual, torch.tensor(at)).float()
    losses = functional.cross_entropy(
        logits, torch.tensor(ids, device=logits.device), reduction="none"
    )
    return (losses * weights.to(losses.device)).sum()
