"""The sampler against transformers' own processors, against softmax, and against itself in company."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from server.engine.request import SamplingParams
from server.engine.sampler import (
    CANDIDATES,
    SampleRow,
    _filter,
    _inverse_cdf,
    _penalise,
    _tempered,
    logprobs_of,
    sample,
    uniform,
)
from tests.tiny_models import tiny_model

VOCAB = 1000
SAMPLED = SamplingParams(do_sample=True)


@pytest.fixture(autouse=True, params=[True, False], ids=["kernel", "plain"])
def _path(request, monkeypatch):
    """Every test runs by the kernels and without them."""
    for function in (sample, logprobs_of):
        one = functools.partial(function, fast=request.param)
        monkeypatch.setitem(globals(), function.__name__, one)


def random_logits(seed: int, vocabulary: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(vocabulary, generator=generator)


def row(params: SamplingParams, token_ids=(1,), num_prompt_tokens: int = 1) -> SampleRow:
    return SampleRow(params, list(token_ids), num_prompt_tokens)


def draw(logits: torch.Tensor, *rows: SampleRow) -> list[int]:
    return [drawn.token_id for drawn in sample(logits.expand(len(rows), -1), list(rows))]


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_allowed", [1, 3, 200, VOCAB - 1])
def test_a_mask_is_what_minus_infinity_would_be(num_allowed):
    generator = torch.Generator().manual_seed(num_allowed)
    allowed = torch.randperm(VOCAB, generator=generator)[:num_allowed].sort().values
    for seed in range(40):
        logits = random_logits(seed)
        forbidden = torch.full_like(logits, -torch.inf)
        forbidden[allowed] = logits[allowed]
        for name, options in enumerate(({"do_sample": False}, *FILTERS)):
            params = replace(SAMPLED, seed=97 * seed + name, **options)
            [masked] = sample(logits[None], [replace(row(params), allowed=allowed)])
            [reference] = sample(forbidden[None], [row(params)])
            assert masked.token_id == reference.token_id


def test_a_mask_leaves_the_other_rows_and_the_reported_logprobs_alone():
    logits = random_logits(1)
    before = logits.clone()
    params = [replace(SAMPLED, seed=i, num_logprobs=2) for i in range(3)]
    params.append(SamplingParams(num_logprobs=2, presence_penalty=1.0))
    free = sample(logits.expand(4, -1), [row(one) for one in params])
    allowed = torch.tensor([4, 9])
    rows = [row(one) for one in params]
    rows[1] = replace(rows[1], allowed=allowed)
    mixed = sample(logits.expand(4, -1), rows)
    assert [mixed[i] for i in (0, 2, 3)] == [free[i] for i in (0, 2, 3)]
    assert mixed[1].token_id in (4, 9)
    assert mixed[1].logprob.top == free[1].logprob.top
    [raw] = logprobs_of(logits[None], [mixed[1].token_id], 2)
    assert mixed[1].logprob == raw
    assert torch.equal(logits, before)


# --- filters ---------------------------------------------------------------------------------

FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": CANDIDATES + 50},
    {"top_k": 10 * VOCAB},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.01},
    {"min_p": 0.5},
    {"min_p": 0.999},
    {"typical_p": 0.05},
    {"typical_p": 0.5},
    {"typical_p": 0.95},
    {"temperature": 0.3, "top_p": 0.8},
    {"temperature": 2.5, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": CANDIDATES + 50, "top_p": 0.99},
    {"top_k": 40, "min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_p": 0.7, "typical_p": 0.6},
    {"min_p": 0.02, "typical_p": 0.4},
    {"temperature": 1.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.8},
    {"temperature": 0.6, "top_k": 300, "top_p": 0.95, "min_p": 0.005, "typical_p": 0.9},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def transformers_scores(model, logits: torch.Tensor, tokens: list[int], **options) -> torch.Tensor:
    """Logits (V,) as transformers' `generate` would hand them to the draw, in its order."""
    config = GenerationConfig(do_sample=True, top_k=0)
    config.update(**options)
    processors = model._get_logits_processor(config, input_ids_seq_length=len(tokens))
    return processors(torch.tensor([tokens]), logits[None].clone())[0]


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_filters_keep_what_transformers_keeps(model, options, spread):
    for seed in range(5):
        logits = random_logits(seed, spread=spread)
        expected = transformers_scores(model, logits, [1], **options)
        params = replace(SAMPLED, **options)
        scores, ids = _filter(_tempered(logits, params.temperature), params)
        kept = torch.arange(VOCAB) if ids is None else ids
        assert sorted(kept.tolist()) == torch.isfinite(expected).nonzero().flatten().tolist()
        torch.testing.assert_close(
            torch.softmax(scores, 0), torch.softmax(expected, 0)[kept], rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_k": 5, "top_p": 0.999}], ids=str)
def test_what_ties_with_the_last_of_top_k_is_kept_as_in_transformers(model, options):
    # bf16 logits tie all the time.
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, -1.0]).repeat(2)
    expected = transformers_scores(model, logits, [1], **options)
    _, ids = _filter(logits, replace(SAMPLED, **options))
    assert sorted(ids.tolist()) == torch.isfinite(expected).nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [CANDIDATES - 1, CANDIDATES, CANDIDATES + 1, 900])
def test_a_nucleus_of_any_size_is_whole(model, size):
    # Nearly flat: `size` tokens have all the mass but a little, and the nucleus is just these.
    logits = torch.full((VOCAB,), -20.0)
    chosen = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(size))[:size]
    logits[chosen] = torch.linspace(0.0, 0.01, size)
    top_p = 1.0 - 0.5 / size
    _, ids = _filter(logits, replace(SAMPLED, top_p=top_p))
    assert sorted(ids.tolist()) == sorted(chosen.tolist())
    expected = transformers_scores(model, logits, [1], top_p=top_p)
    assert sorted(ids.tolist()) == torch.isfinite(expected).nonzero().flatten().tolist()


def test_no_filter_keeps_the_vocabulary():
    logits = random_logits(0)
    scores, ids = _filter(logits, SAMPLED)
    assert ids is None
    assert torch.equal(scores, logits)


# --- penalties -------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_is_transformers(penalty):
    logits = random_logits(3)
    tokens = [5, 9, 5, 700, 31, 31]  # prompt and output count alike
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits[None])[0]
    got = _penalise(logits.clone(), row(replace(SAMPLED, repetition_penalty=penalty), tokens, 2))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (-1.5, 0.3)])
def test_presence_and_frequency_penalties_are_openais_over_the_output_only(presence, frequency):
    logits = random_logits(4)
    tokens = [5, 9, 11, 9, 9, 700]
    params = replace(SAMPLED, presence_penalty=presence, frequency_penalty=frequency)
    got = _penalise(logits.clone(), row(params, tokens, 3))
    expected = logits.clone()
    for token, count in {9: 2, 700: 1}.items():
        expected[token] -= presence + count * frequency
    torch.testing.assert_close(got, expected)
    assert torch.equal(_penalise(logits.clone(), row(params, tokens, 6)), logits)


def test_all_penalties_and_filters_together_are_transformers(model):
    tokens = [5, 9, 11, 9, 700]
    options = {"repetition_penalty": 1.4, "temperature": 0.8, "top_k": 50, "top_p": 0.9}
    for seed in range(5):
        logits = random_logits(seed)
        expected = transformers_scores(model, logits, tokens, **options)
        params = replace(SAMPLED, **options)
        penalised = _penalise(logits.clone(), row(params, tokens, 2))
        _, ids = _filter(_tempered(penalised, params.temperature), params)
        assert sorted(ids.tolist()) == torch.isfinite(expected).nonzero().flatten().tolist()


def test_greedy_obeys_penalties_and_nothing_else():
    logits = torch.tensor([0.0, 4.0, 3.5, 3.0])
    plain = SamplingParams(temperature=9.0, top_k=1, top_p=0.1, seed=8)
    assert draw(logits, row(plain)) == [1]
    assert draw(logits, row(replace(plain, repetition_penalty=1.3), [1], 1)) == [2]
    assert draw(logits, row(replace(plain, presence_penalty=2.0), [1], 1)) == [1]  # the prompt's
    assert draw(logits, row(replace(plain, presence_penalty=2.0), [0, 1], 1)) == [2]
    assert draw(logits, row(replace(plain, frequency_penalty=0.3), [0, 1, 1], 1)) == [2]


# --- draws -----------------------------------------------------------------------------------


def too_far(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Chi-square more than five standard deviations above its mean."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.numel() - 1
    return statistic > freedom + 5 * math.sqrt(2 * freedom)


def histogram(numbers: list[float], bins: int) -> torch.Tensor:
    return torch.histc(torch.tensor(numbers, dtype=torch.float64), bins, 0.0, 1.0)


SERIES = {
    "seeds": lambda i: (i, 0),
    "positions": lambda i: (12345, i),
    "far seeds": lambda i: (i << 40, 3),
    "seeds and positions": lambda i: (i % 100, i // 100),
    "backwards": lambda i: (2**63 - 1 - i, i),
}


@pytest.mark.parametrize("series", list(SERIES))
def test_uniform_is_uniform(series):
    numbers = [uniform(*SERIES[series](i)) for i in range(20_000)]
    assert all(0.0 <= number < 1.0 for number in numbers)
    assert not too_far(histogram(numbers, 100), torch.full((100,), 200.0))


@pytest.mark.parametrize(
    "step", [(1, 0), (0, 1), (1, 1), (1, -1), (1 << 32, 0)], ids=["s", "p", "sp", "s-p", "far"]
)
def test_neighbouring_seeds_and_positions_are_independent(step):
    pairs = [
        (uniform(seed, place), uniform(seed + step[0], place + step[1]))
        for seed in range(200)
        for place in range(1, 101)
    ]
    cells = [(int(10 * a) + int(10 * b) * 10 + 0.5) / 100 for a, b in pairs]
    assert not too_far(histogram(cells, 100), torch.full((100,), len(pairs) / 100))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_draws_follow_the_distribution(model, options, along):
    logits = random_logits(5, vocabulary=12, spread=1.5)
    options = {"temperature": 1.0, **options}
    count = 4000
    if along == "seeds":
        rows = [row(replace(SAMPLED, seed=i, **options), [3], 1) for i in range(count)]
    else:
        rows = [row(replace(SAMPLED, seed=7, **options), [3] * (1 + i), 1) for i in range(count)]
    drawn = torch.tensor(draw(logits, *rows))
    expected = torch.softmax(transformers_scores(model, logits, [3], **options), 0) * count
    counts = torch.bincount(drawn, minlength=12).float()
    assert counts[expected == 0].sum() == 0
    assert not too_far(counts[expected > 0], expected[expected > 0])


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-53, 3)])
def test_the_ends_of_the_distribution(number, expected):
    """A token without mass is never drawn, not even by the first and the last number."""
    scores = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert _inverse_cdf(scores, None, number) == expected
    assert _inverse_cdf(scores, torch.arange(5) + 10, number) == expected + 10


# --- company ---------------------------------------------------------------------------------


def mixed_rows(count: int) -> list[SampleRow]:
    """Rows with every kind of parameters."""
    kinds = [
        SamplingParams(num_logprobs=0),
        SamplingParams(repetition_penalty=1.3, num_logprobs=3),
        SamplingParams(frequency_penalty=0.5, presence_penalty=0.2, num_logprobs=0),
        *(replace(SAMPLED, num_logprobs=5, **options) for options in FILTERS),
    ]
    return [
        SampleRow(replace(kinds[i % len(kinds)], seed=i), [i % 7, i % 11, i % 13, i], 1 + i % 4)
        for i in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_gets_the_same_token_in_any_company(dtype):
    rows = mixed_rows(60)
    logits = torch.stack([random_logits(i) for i in range(60)]).to(dtype)
    together = sample(logits, rows)
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(60)]
    assert together == alone
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert [together[i] for i in order] == shuffled


def test_equal_maxima_are_resolved_alike_in_any_company():
    logits = torch.zeros(9, 5000)
    logits[:, 100::7] = 2.0
    for size in (1, 2, 9):
        drawn = sample(logits[:size], [row(SamplingParams())] * size)
        assert {one.token_id for one in drawn} == {100}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad):
    rows = mixed_rows(6)
    logits = torch.stack([random_logits(i) for i in range(6)])
    expected = sample(logits, rows)
    if bad == -math.inf:
        logits[2] = bad
    else:
        logits[2, 123] = bad
    got = sample(logits, rows)
    assert got[2].token_id is None
    assert got[2].logprob is None
    assert got[:2] + got[3:] == expected[:2] + expected[3:]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-40},
        {"temperature": 1e-300},
        {"temperature": 1e-300, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.5, "top_k": 3},
        {"repetition_penalty": 1e-300, "top_k": 1},
        {"temperature": 1e-6, "top_p": 1e-300},
    ],
    ids=str,
)
def test_extreme_parameters_come_to_the_most_likely_token(options):
    logits = random_logits(6)
    logits[0] = 0.0  # 0 / 0 must not come of it
    best = int(logits.argmax())
    rows = [row(replace(SAMPLED, seed=s, **options), [0, best], 1) for s in range(20)]
    assert set(draw(logits, *rows)) == {best}


@pytest.mark.parametrize(
    "options", [{"temperature": 1e300}, {"repetition_penalty": 1e300}, {"top_k": 10**30}], ids=str
)
def test_extreme_parameters_give_some_token(options):
    logits = random_logits(6)
    rows = [row(replace(SAMPLED, seed=s, **options), [0, 1, 2], 1) for s in range(20)]
    assert all(0 <= token < VOCAB for token in draw(logits, *rows))


# --- log-probabilities -----------------------------------------------------------------------


def test_logprobs_are_the_raw_log_softmax():
    logits = random_logits(8)
    raw = torch.log_softmax(logits.float(), 0)
    for one in mixed_rows(30):
        (drawn,) = sample(logits[None], [replace_logprobs(one, 4)])
        assert drawn.logprob.logprob == pytest.approx(float(raw[drawn.token_id]), abs=1e-5)
        values, ids = raw.topk(4)
        assert [token for token, _ in drawn.logprob.top] == ids.tolist()
        assert [value for _, value in drawn.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def replace_logprobs(one: SampleRow, count: int | None) -> SampleRow:
    return replace(one, params=replace(one.params, num_logprobs=count))


def test_logprobs_are_given_when_asked_for():
    logits = random_logits(9)
    (none,) = sample(logits[None], [row(SamplingParams())])
    assert none.logprob is None
    (chosen,) = sample(logits[None], [row(SamplingParams(num_logprobs=0))])
    assert chosen.logprob.top == ()
    (everything,) = sample(logits[None], [row(SamplingParams(num_logprobs=10 * VOCAB))])
    assert len(everything.logprob.top) == VOCAB


def test_logprobs_of_given_tokens():
    logits = torch.stack([random_logits(i) for i in range(3)]).bfloat16()
    got = logprobs_of(logits, [4, 5, 6], 2)
    raw = torch.log_softmax(logits.float(), -1)
    assert [entry.logprob for entry in got] == pytest.approx(
        [float(raw[i, token]) for i, token in enumerate([4, 5, 6])], abs=1e-5
    )
    assert [len(entry.top) for entry in got] == [2, 2, 2]
