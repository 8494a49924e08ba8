"""Scores by hand, and ranks against one forward pass of the plain model for every label."""

from __future__ import annotations

import math
import random

import pytest
import torch

from adapters.method import parse_config
from adapters.methods import METHODS
from adapters.methods.ia3 import attach_ia3, ia3_layers
from adapters.training.packed import PackedBase
from adapters.training.ranking import Scores, mean_loss, rank, score
from tests.adapters.training.reference import log_likelihood, random_virtual
from tests.adapters.training.tiny_jobs import LABEL_IDS, tiny_examples
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model, tiny_spec

# --- accuracy and macro-F1 ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "right", "accuracy", "macro_f1"),
    [
        ([0, 1, 2], [0, 1, 2], 1.0, 1.0),
        ([1, 0], [0, 1], 0.0, 0.0),
        # label 0: precision 1/2, recall 1 -> 2/3; label 1: precision 1, recall 1/2 -> 2/3
        ([0, 0, 1], [0, 1, 1], 2 / 3, 2 / 3),
        # always the most frequent label: F1 of 0 is 2*3/(4+3), those of 1 and 2 are 0
        ([0, 0, 0, 0], [0, 0, 0, 1], 0.75, (6 / 7 + 0) / 2),
        # a label that is chosen and never right counts as 0: 0: 2/3, 1: 1, 5: 0
        ([0, 5, 1], [0, 0, 1], 2 / 3, (2 / 3 + 1 + 0) / 3),
        # sklearn's f1_score(average="macro") of its own documentation: 0.8, 0 and 0 over three
        ([0, 2, 1, 0, 0, 1], [0, 1, 2, 0, 1, 2], 1 / 3, 0.8 / 3),
        ([7], [7], 1.0, 1.0),
    ],
)
def test_scores_by_hand(chosen, right, accuracy, macro_f1):
    got = score(chosen, right)
    assert got == Scores(pytest.approx(accuracy), pytest.approx(macro_f1))


@pytest.mark.parametrize(("chosen", "right"), [([], []), ([0], []), ([], [0]), ([0, 1], [0])])
def test_a_choice_for_each_row_is_needed(chosen, right):
    with pytest.raises(ValueError, match=f"each of {len(right)} rows, came {len(chosen)}"):
        score(chosen, right)


# --- ranking --------------------------------------------------------------------------------

# Of one token and of many, one the beginning of another, and two with the same beginning.
LABELS = [(10, 2), (11,), (11, 12, 2), (11, 12, 13, 14, 15, 16, 2), (40, 41)]


def prompts_of(lengths=(3, 1, 30, 8, 8), seed=0):
    draw = random.Random(seed)
    return [tuple(draw.randrange(14, VOCAB) for _ in range(length)) for length in lengths]


def adapted(architecture, kind):
    """A packed base, a plain model that says the same, and what stands before the rows."""
    model, plain = tiny_model(architecture), tiny_model(architecture)
    spec = tiny_spec(plain)
    if kind == "ia3":
        method = METHODS["IA3"]
        raw = {"peft_type": "IA3", "init_ia3_weights": False}
        config = method.complete_config(parse_config(method.config_class, raw), spec)
        for one in (model, plain):
            torch.manual_seed(4)
            attach_ia3(one, config, spec)
        assert ia3_layers(plain)
        kind = "none"
    return PackedBase(model, spec), plain, random_virtual(kind, spec)


def log_likelihoods(plain, virtual, prompts, labels):
    return torch.tensor(
        [[log_likelihood(plain, virtual, prompt, label) for label in labels] for prompt in prompts]
    )


CASES = [(architecture, "prefix") for architecture in ARCHITECTURES]
CASES += [(a, kind) for a in ("llama", "gpt2", "gemma3") for kind in ("none", "soft", "ia3")]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_every_label_after_every_prompt(architecture, kind):
    base, plain, virtual = adapted(architecture, kind)
    prompts = prompts_of()
    got = rank(base, virtual, prompts, LABELS)
    want = log_likelihoods(plain, virtual, prompts, LABELS)
    assert got.shape == (5, 5)
    assert (got.dtype, got.device.type) == (torch.float32, "cpu")
    assert not got.requires_grad
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 0.5, "labels that are all as likely compare nothing"


def test_more_rows_than_one_pass_holds_stay_in_their_order():
    base, plain, virtual = adapted("llama", "prefix")
    prompts = prompts_of([1 + (37 * number) % 50 for number in range(120)])
    calls = []
    got = rank(base, virtual, prompts, LABELS, lambda: calls.append(1))
    assert len(calls) > 3
    assert (got - log_likelihoods(plain, virtual, prompts, LABELS)).abs().max() < 1e-4


def test_a_row_longer_than_a_pass_has_one_of_its_own():
    base, plain, virtual = adapted("bloom", "prefix")
    prompts = prompts_of([1100, 2])
    got = rank(base, virtual, prompts, LABELS)
    assert (got - log_likelihoods(plain, virtual, prompts, LABELS)).abs().max() < 1e-3


class CountingBase(PackedBase):
    """Notes how many positions' logits a forward pass was asked for."""

    most = 0

    def logits(self, packed, virtual, at):
        self.most = max(self.most, len(at))
        return super().logits(packed, virtual, at)


def test_many_labels_read_a_prompts_end_once():
    """A thousand labels of one token must not copy a thousand rows of the vocabulary a prompt."""
    spec = tiny_spec(tiny_model("llama"))
    base = CountingBase(tiny_model("llama"), spec)
    prompts = prompts_of([4] * 20)
    labels = [(token,) for token in range(VOCAB)]
    got = rank(base, None, prompts, labels)
    assert base.most <= 20
    # Every token of the vocabulary is a label: the likelihoods of a prompt sum to 1.
    assert got.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 20, abs=1e-5)


def test_nothing_is_ranked_without_prompts():
    base, _, virtual = adapted("llama", "prefix")
    assert rank(base, virtual, [], LABELS).shape == (0, 5)


class Enough(Exception):
    pass


def stop():
    raise Enough


def test_ranking_and_loss_can_be_stopped():
    base, _, virtual = adapted("llama", "soft")
    with pytest.raises(Enough):
        rank(base, virtual, prompts_of(), LABELS, stop)
    with pytest.raises(Enough):
        mean_loss(base, virtual, tiny_examples().train, stop)


@pytest.mark.parametrize("kind", ["none", "prefix", "soft", "ia3"])
@pytest.mark.parametrize("num_rows", [1, 10, 120])
def test_mean_loss_is_that_of_the_target_tokens(kind, num_rows):
    base, plain, virtual = adapted("qwen3", kind)
    rows = tiny_examples(num_train=num_rows).train
    want = sum(log_likelihood(plain, virtual, row.prompt_ids, row.target_ids) for row in rows)
    want /= -sum(len(row.target_ids) for row in rows)
    assert mean_loss(base, virtual, rows) == pytest.approx(want, rel=1e-5)


def test_the_labels_of_the_loss_are_those_of_the_ranking():
    """The loss of a row is minus its own label's score over that label's tokens."""
    base, _, virtual = adapted("llama", "prefix")
    row = tiny_examples().train[0]
    scores = rank(base, virtual, [row.prompt_ids], LABEL_IDS)[0]
    loss = mean_loss(base, virtual, [row])
    assert math.isclose(loss, -float(scores[row.label]) / len(row.target_ids), rel_tol=1e-5)
