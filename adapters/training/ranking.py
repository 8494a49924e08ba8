"""Evaluation: the loss on held-out rows and, with labels, label ranking by likelihood.

A label's score is the log-likelihood of its tokens (separator and end of sequence included, as in
training) after the prompt. The prompt is computed once for all labels, which are its branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.parts import KVPrefix, SoftPrompt
from adapters.training.examples import Example
from adapters.training.objective import num_targets, summed_loss
from adapters.training.packed import PackedBase, TokenRow, pack

# Tokens of one forward pass without gradients.
_PASS_TOKENS = 1024


@dataclass(frozen=True)
class Scores:
    """Classification scores.

    Attributes:
        accuracy: share of rows whose most likely label is theirs.
        macro_f1: F1 averaged over the labels, each counting the same; a label that neither occurs
            nor is chosen is left out.
    """

    accuracy: float
    macro_f1: float


def score(chosen: Sequence[int], right: Sequence[int]) -> Scores:
    """Accuracy and macro-F1 of chosen labels.

    Raises:
        ValueError: no row, or not one choice a row.
    """
    if not right or len(chosen) != len(right):
        raise ValueError(f"expected a choice for each of {len(right)} rows, came {len(chosen)}")
    f1: list[float] = []
    for label in sorted({*chosen, *right}):
        hits = sum(c == r == label for c, r in zip(chosen, right, strict=True))
        f1.append(2 * hits / (chosen.count(label) + right.count(label)))
    hits = sum(c == r for c, r in zip(chosen, right, strict=True))
    return Scores(hits / len(right), sum(f1) / len(f1))


def commonest_share(right: Sequence[int]) -> float:
    """The accuracy of always choosing the commonest of these labels.

    Raises:
        ValueError: no row.
    """
    if not right:
        raise ValueError("expected at least one row")
    return max(Counter(right).values()) / len(right)


@torch.no_grad()
def rank(
    base: PackedBase,
    virtual: KVPrefix | SoftPrompt | None,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    should_stop: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Log-likelihood of every label after every prompt, (N, L), float32 on the CPU.

    Args:
        base: the frozen base, with IA3 attached where the adapter is one.
        virtual: virtual tokens before the prompts; a soft prompt is run once (`PackedBase.fold`).
        prompts: token ids, each at least one.
        label_ids: token ids of the labels, each at least one.
        should_stop: called before every forward pass; raises to stop.
    """
    virtual = base.fold(virtual)
    scores = torch.empty(len(prompts), len(label_ids))
    extra = sum(len(ids) - 1 for ids in label_ids)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    for rows in _passes(order, [len(prompt) + extra for prompt in prompts]):
        should_stop()
        scores[rows] = _rank_pass(base, virtual, [prompts[row] for row in rows], label_ids)
    return scores


@torch.no_grad()
def mean_loss(
    base: PackedBase,
    virtual: KVPrefix | SoftPrompt | None,
    examples: Sequence[Example],
    should_stop: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross entropy per target token over these rows."""
    virtual = base.fold(virtual)
    lengths = [len(example.prompt_ids) + len(example.target_ids) for example in examples]
    order = sorted(range(len(examples)), key=lambda row: lengths[row])
    total = 0.0
    for rows in _passes(order, lengths):
        should_stop()
        total += float(summed_loss(base, virtual, [examples[row] for row in rows]))
    return total / num_targets(examples, None)


def _passes(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split rows, in order, into passes of at most `_PASS_TOKENS` tokens."""
    passes: list[list[int]] = []
    tokens = 0
    for row in order:
        if not passes or tokens + lengths[row] > _PASS_TOKENS:
            passes.append([])
            tokens = 0
        passes[-1].append(row)
        tokens += lengths[row]
    return passes


def _rank_pass(
    base: PackedBase,
    virtual: KVPrefix | SoftPrompt | None,
    prompts: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
) -> torch.Tensor:
    # A label's last token is predicted and never read.
    branches = [ids[:-1] for ids in label_ids]
    packed = pack([TokenRow(prompt, branches) for prompt in prompts])
    # Logits at a prompt's end are computed once for all labels: a row is as wide as the vocabulary.
    at: list[int] = []
    ids: list[int] = []
    read_at: list[int] = []  # a label's token -> where in `at` it is predicted
    label_of: list[int] = []
    for number, (start, prompt) in enumerate(zip(packed.starts, prompts, strict=False)):
        end = len(at)
        at.append(start + len(prompt) - 1)
        branch_start = start + len(prompt)
        for label, tokens in enumerate(label_ids):
            rest = len(tokens) - 1
            read_at += [end, *range(len(at), len(at) + rest)]
            at += range(branch_start, branch_start + rest)
            ids += tokens
            label_of += [number * len(label_ids) + label] * len(tokens)
            branch_start += rest
    logits = base.logits(packed, virtual, torch.tensor(at)).float().cpu()
    rows = torch.tensor(read_at)
    log_likelihoods = logits[rows, torch.tensor(ids)] - torch.logsumexp(logits, dim=1)[rows]
    sums = torch.zeros(len(prompts) * len(label_ids))
    sums.index_add_(0, torch.tensor(label_of), log_likelihoods)
    return sums.view(len(prompts), len(label_ids))
