"""The sampling kernels against the sampler's own filters, which are held to transformers'."""

from __future__ import annotations

import math
import random

import pytest
import torch

from server.engine.request import SamplingParams
from server.engine.sampler import _filter, _inverse_cdf, _tempered
from server.engine.sampling_kernels import draw_places, first_best, log_normalisers


def vector(length: int, spread: float, seed: int, *, coarse: bool = False) -> torch.Tensor:
    """Logits; coarse ones tie often."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(length, generator=generator)
    return logits.bfloat16().float() if coarse else logits


def expected_place(logits: torch.Tensor, numbers: tuple[float, float, float, float, float]) -> int:
    temperature, top_k, top_p, min_p, number = numbers
    params = SamplingParams(do_sample=True, top_k=int(top_k), top_p=top_p, min_p=min_p)
    return _inverse_cdf(*_filter(_tempered(logits, temperature), params), number)


def some_numbers(choice: random.Random, length: int) -> tuple[float, float, float, float, float]:
    return (
        choice.choice([1e-6, 0.1, 0.8, 1.0, 5.0, 100.0]),
        choice.choice([0, 0, 1, 5, 50, length, length + 9]),
        choice.choice([1.0, 1.0, 0.95, 0.5, 0.01, 0.999]),
        choice.choice([0.0, 0.0, 0.05, 0.9]),
        choice.choice([1e-9, choice.random(), 0.999]),
    )


def neighbours(logits: torch.Tensor, one: int, other: int) -> bool:
    """The same place, or next to each other where the order is that of the draw, or equal there.

    Sums of thousands of weights differ in their last bits, and a draw may fall between the two.
    """
    ranks = [int((logits > logits[place]).sum()) for place in (one, other)]
    return abs(ranks[0] - ranks[1]) <= 1 or (len(logits) > 1000 and abs(one - other) <= 1)


@pytest.mark.parametrize("length", [1, 2, 17, 97, 1000, 49152])
def test_the_place_is_that_of_a_full_sort(length):
    choice = random.Random(length)
    for seed in range(400 if length < 10_000 else 12):
        spread = choice.choice([0.01, 1.0, 3.0, 10.0, 100.0])
        logits = vector(length, spread, seed, coarse=seed % 3 == 0)
        numbers = some_numbers(choice, length)
        [got] = draw_places([logits], [numbers])
        expected = expected_place(logits, numbers)
        assert neighbours(logits, got, expected), (seed, numbers)


def test_the_last_number_still_draws_what_is_kept():
    for seed in range(50):
        logits = vector(500, 5.0, seed)
        kept, ids = _filter(logits - logits.max(), SamplingParams(do_sample=True, top_p=0.9))
        [place] = draw_places([logits], [(1.0, 0, 0.9, 0.0, 1 - 2**-53)])
        assert place in ids[max(0, len(kept) - 2) :].tolist()
        assert draw_places([logits], [(1.0, 0, 1.0, 0.0, 1 - 2**-53)])[0] in range(500)


def test_all_equal_and_all_but_one():
    flat = torch.zeros(5000)
    numbers = (1.0, 0, 0.5, 0.0, 0.999)
    [place] = draw_places([flat], [numbers])
    assert place == 2497
    flat[777] = 200.0
    assert draw_places([flat], [numbers]) == [777]


def test_rows_of_any_length_and_layout_at_once(torch_threads):
    rows = [vector(n, 3.0, n) for n in (5, 3000, 1, 64, 49152)]
    rows.append(torch.stack([vector(100, 3.0, 7)] * 3, dim=1)[:, 1])
    choice = random.Random(0)
    numbers = [some_numbers(choice, len(row)) for row in rows]
    alone = [draw_places([row], [one])[0] for row, one in zip(rows, numbers, strict=True)]
    for threads in (1, 2, 5):
        torch_threads(threads)
        assert draw_places(rows, numbers) == alone


def test_every_token_as_often_as_it_is_likely():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    draws = 4000
    for top_p in (1.0, 0.999999):
        numbers = [(1.0, 0, top_p, 0.0, (i + 0.5) / draws) for i in range(draws)]
        places = draw_places([logits] * draws, numbers)
        counts = [places.count(place) for place in range(4)]
        assert counts == pytest.approx([2000, 1000, 500, 500], abs=2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_allows_no_choice_is_told(bad):
    good = vector(3000, 3.0, 1)
    spoilt = good.clone() if not math.isinf(bad) or bad > 0 else torch.full_like(good, bad)
    spoilt[1234] = bad
    numbers = (0.8, 0, 0.95, 0.0, 0.3)
    [one] = draw_places([good], [numbers])
    assert draw_places([spoilt, good], [numbers] * 2) == [-1, one]


def test_minus_infinity_is_never_drawn():
    logits = torch.full((3000,), -math.inf)
    logits[[5, 2999]] = 1.0
    places = draw_places([logits] * 4, [(1.0, 0, p, 0.0, u) for p in (1, 0.9) for u in (0.2, 0.9)])
    assert places == [5, 2999, 5, 2999]


@pytest.mark.parametrize("length", [1, 15, 16, 129, 49152])
def test_normalisers_and_the_largest(length, torch_threads):
    torch_threads(3)
    rows = [vector(length, 4.0, seed) for seed in range(9)]
    for num_top in sorted({0, 1, min(5, length), min(300, length)}):
        sums, largest = log_normalisers(rows, num_top)
        whole = torch.stack(rows).double()
        torch.testing.assert_close(
            torch.tensor(sums, dtype=torch.float64), torch.logsumexp(whole, -1), rtol=0, atol=2e-6
        )
        assert largest == torch.topk(whole, num_top).indices.tolist()


def test_the_first_of_equal_logits_is_told_first():
    _, largest = log_normalisers([torch.tensor([1.0, 3.0, 3.0, 1.0] * 100)], 4)
    assert largest == [[1, 2, 5, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 131, 49152])
def test_the_first_of_the_best(length, dtype, torch_threads):
    torch_threads(3)
    # In bf16 many tie.
    rows = [vector(length, 4.0, seed).to(dtype) for seed in range(9)]
    rows.append(torch.stack([rows[0]] * 2, dim=1)[:, 1])
    expected = [int((row == row.max()).nonzero()[0]) for row in rows]
    assert first_best(rows) == expected
    for bad in (math.nan, math.inf):
        for place in {0, length // 2, length - 1}:
            spoilt = rows[1].clone()
            spoilt[place] = bad
            assert first_best([rows[0], spoilt, rows[2]]) == [expected[0], -1, expected[2]]
    assert first_best([torch.full((length,), -math.inf, dtype=dtype)]) == [-1]
