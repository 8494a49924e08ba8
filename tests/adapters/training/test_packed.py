"""Packed rows against one row at a time through the plain transformers model."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from adapters.parts import KVPrefix, SoftPrompt
from adapters.training.packed import SIMILAR, PackedBase, TokenRow, _similar_rows, pack
from tests.adapters.training.reference import (
    leaves,
    own_logits,
    random_virtual,
    row_logits,
)
from tests.tiny_models import ARCHITECTURES, VOCAB, tiny_model, tiny_spec

# One token, equal ones, and rows longer than the windows of 12 with a prefix of 7 before them.
LENGTHS = (5, 1, 40, 2, 17, 40, 3, 1, 24)
KINDS = ("none", "prefix", "soft")


def rows_of(lengths=LENGTHS, seed=0):
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, VOCAB) for _ in range(length)) for length in lengths]


def everything(packed):
    return torch.arange(len(packed.ids))


def close(got, want):
    """Equal up to float32's rounding on the scale of what is compared."""
    got, want = got.detach(), want.detach()
    scale = float(want.abs().max())
    assert scale > 0, "a comparison of zeros"
    error = float((got - want).abs().max())
    assert error <= 2e-5 * max(scale, 1.0), f"{error} apart, on a scale of {scale}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_and_gradients_are_those_of_each_row_alone(architecture, kind):
    plain, model = tiny_model(architecture), tiny_model(architecture)
    spec = tiny_spec(plain)
    rows = rows_of()
    ours, theirs = random_virtual(kind, spec), random_virtual(kind, spec)
    packed = pack([TokenRow(row) for row in rows])
    logits = PackedBase(model, spec).logits(packed, ours, everything(packed))
    want = [own_logits(plain, theirs, row) for row in rows]
    bounds = itertools.pairwise(packed.starts)
    for row, (start, end), alone in zip(rows, bounds, want, strict=True):
        assert end - start == len(row)
        close(logits[start:end], alone)
    if kind == "none":
        return
    # Every logit counts, each with a number of its own.
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (torch.cat(want) * weights).sum().backward()
    for got, expected in zip(leaves(ours), leaves(theirs), strict=True):
        close(got.grad, expected.grad)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_soft_prompts_own_rows_count_from_the_end(architecture):
    plain, spec = tiny_model(architecture), tiny_spec(tiny_model(architecture))
    base = PackedBase(tiny_model(architecture), spec)
    virtual, rows = random_virtual("soft", spec), rows_of((4, 9))
    with torch.no_grad():
        got = base.logits(pack([TokenRow(row) for row in rows]), virtual, torch.arange(-7, 0))
        close(got, row_logits(plain, virtual, rows[1])[:7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_branches_are_rows_of_their_own(architecture, kind):
    plain, spec = tiny_model(architecture), tiny_spec(tiny_model(architecture))
    virtual = random_virtual(kind, spec)
    trunks = rows_of((6, 1, 20))
    branches = [rows_of((3, 1, 0, 14), seed=number) for number in (1, 2, 3)]
    rows = [TokenRow(trunk, own) for trunk, own in zip(trunks, branches, strict=True)]
    packed = pack(rows)
    got = PackedBase(tiny_model(architecture), spec).logits(packed, virtual, everything(packed))
    for start, row in zip(packed.starts, rows, strict=False):
        at = start + len(row.trunk)
        close(got[start:at], own_logits(plain, virtual, row.trunk))
        for branch in row.branches:
            alone = own_logits(plain, virtual, [*row.trunk, *branch])
            if branch:
                close(got[at : at + len(branch)], alone[-len(branch) :])
            at += len(branch)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_layout(seed):
    """Random rows, branches and virtual tokens, over the attentions that differ most."""
    draw = random.Random(seed)
    architecture = ("llama", "mistral", "gemma3", "bloom", "gpt2", "gemma2")[seed]
    plain, spec = tiny_model(architecture), tiny_spec(tiny_model(architecture))
    base = PackedBase(tiny_model(architecture), spec)
    for _ in range(4):
        virtual = random_virtual(draw.choice(KINDS), spec, draw.choice((1, 7, 19)), seed)
        rows = []
        for _ in range(draw.randrange(1, 8)):
            lengths = [draw.randrange(0, 6) for _ in range(draw.randrange(0, 4))]
            (trunk,) = rows_of((draw.choice((1, 2, 12, 13, 33)),), draw.random())
            rows.append(TokenRow(trunk, rows_of(lengths, draw.random())))
        packed = pack(rows)
        got = base.logits(packed, virtual, everything(packed))
        want = []
        for row in rows:
            want.append(own_logits(plain, virtual, row.trunk))
            for branch in row.branches:
                alone = own_logits(plain, virtual, [*row.trunk, *branch])
                want.append(alone[len(row.trunk) :])
        close(got, torch.cat(want))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_folded_soft_prompt_is_the_soft_prompt(architecture):
    spec = tiny_spec(tiny_model(architecture))
    base = PackedBase(tiny_model(architecture), spec)
    soft = random_virtual("soft", spec, num=15)
    folded = base.fold(soft)
    assert isinstance(folded, KVPrefix)
    folded.check(spec)
    packed = pack([TokenRow(row) for row in rows_of()])
    close(
        base.logits(packed, folded, everything(packed)),
        base.logits(packed, soft, everything(packed)),
    )
    assert base.fold(folded) is folded
    assert base.fold(None) is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_texts_keys_and_values_are_the_text(architecture):
    plain, spec = tiny_model(architecture), tiny_spec(tiny_model(architecture))
    base = PackedBase(tiny_model(architecture), spec)
    (text,) = rows_of((15,), seed=9)
    prefix = base.keys_values(text)
    prefix.check(spec)
    assert prefix.keys.dtype == torch.float32
    rows = rows_of((3, 1, 30))
    packed = pack([TokenRow(row) for row in rows])
    got = base.logits(packed, prefix, everything(packed))
    want = [own_logits(plain, None, [*text, *row])[len(text) :] for row in rows]
    close(got, torch.cat(want))
    # Embedded, the same text is a soft prompt.
    soft = SoftPrompt(base.embed(text))
    close(base.logits(packed, soft, everything(packed)), torch.cat(want))


@torch.no_grad()
def test_only_the_logits_that_are_asked_for():
    spec = tiny_spec(tiny_model("llama"))
    base = PackedBase(tiny_model("llama"), spec)
    packed = pack([TokenRow(row) for row in rows_of()])
    whole = base.logits(packed, None, everything(packed))
    at = torch.tensor([8, 3, 3, 0, 90])
    got = base.logits(packed, None, at)
    assert got.shape == (5, VOCAB)
    close(got, whole[at])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_half_precision_base(dtype):
    """As near to float32 as the plain model in that precision is, or nearer by chance."""
    exact, plain = tiny_model("llama"), tiny_model("llama", dtype=dtype)
    spec = tiny_spec(exact)
    rows = rows_of()
    packed = pack([TokenRow(row) for row in rows])
    virtual = random_virtual("prefix", spec)
    got = PackedBase(tiny_model("llama", dtype=dtype), spec).logits(
        packed, virtual, everything(packed)
    )
    assert got.dtype == dtype
    rounded = KVPrefix(virtual.keys.to(dtype), virtual.values.to(dtype))
    want = torch.cat([own_logits(exact, virtual, row) for row in rows])
    theirs = torch.cat([own_logits(plain, rounded, row) for row in rows])
    ours_off = float((got.float() - want).abs().mean())
    theirs_off = float((theirs.float() - want).abs().mean())
    assert 0 < ours_off <= 1.2 * theirs_off


def test_what_lies_in_a_group_is_similar():
    draw = random.Random(3)
    for _ in range(50):
        lengths = [draw.randrange(1, 60) for _ in range(draw.randrange(1, 30))]
        starts = [0, *itertools.accumulate(lengths)]
        groups = _similar_rows(starts)
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        for group in groups:
            own = [lengths[row] for row in group]
            assert min(own) >= SIMILAR * max(own)


def test_nothing_to_pack_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        pack([])
    with pytest.raises(ValueError, match="at least one token"):
        pack([TokenRow((1, 2)), TokenRow(())])
