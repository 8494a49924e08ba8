"""Logits to tokens, row by row.

A logit bias comes first; the filters apply in transformers' order: repetition, presence and frequency
penalties, temperature, top_k, top_p, min_p, typical_p. Each row is worked out by itself, so the token does
not depend on who else is in the batch; rows that take the plain argmax are done together.

A draw is the inverse of the cumulative distribution at one uniform number, a hash of (seed, index of
the output token). So there is no generator to keep, a preempted sequence draws the same tokens again,
and one number a row is hashed where Gumbel noise would need one a vocabulary entry.

Rejected: sorting the whole vocabulary for top_p (65 ms a step at 32 rows of 49,152 on two cores). The
most likely CANDIDATES tokens are found instead, and only a row whose nucleus reaches past them is
sorted in full. `sampling_kernels` sorts even less, on the CPU: 32 rows of wide nuclei, one core, 8 ms where
what is written here takes 512; with five log-probabilities 10 where it takes 736.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

import torch

from server.engine.request import SamplingParams, TokenLogprob
from server.engine.sampling_kernels import draw_places, first_best, log_normalisers

CANDIDATES = 256
_MASK64 = (1 << 64) - 1
# Below this float32 runs out of numbers, and above it the most likely token is the only one already.
_COLDEST = 1e-6
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SampleRow:
    """What one row's choice depends on.

    Attributes:
        params: its sampling parameters.
        token_ids: prompt and output so far.
        num_prompt_tokens: how many of them are the prompt.
        allowed: ids (K,) that may be chosen, ascending, K >= 1; None is all of them.
    """

    params: SamplingParams
    token_ids: SequenceType[int]
    num_prompt_tokens: int
    allowed: torch.Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """A chosen token; None when the row's logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by (seed, position): two rounds of splitmix64 (Steele et al., 2014)."""
    state = (seed * 0x9E3779B97F4A7C15 + position + 1) & _MASK64
    for _ in range(2):
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        state = z ^ (z >> 31)
    return (state >> 11) / float(1 << 53)


def sample(
    row_logits: SequenceType[torch.Tensor] | torch.Tensor,
    rows: list[SampleRow],
    *,
    fast: bool = True,
) -> list[Drawn]:
    """Choose a token for every row.

    Args:
        row_logits: the model's logits, (V,) a row; any float dtype, worked on in float32.
        rows: what each choice depends on.
        fast: let `sampling_kernels` do it on the CPU.
    """
    if not rows:
        return []
    logits = list(row_logits)
    fast = fast and _fits(logits[0])
    tokens = _best(logits, fast)
    chosen = [i for i, row in enumerate(rows) if tokens[i] is not None and not _is_plain(row)]
    if fast:
        drawn = [i for i in chosen if rows[i].params.do_sample and rows[i].params.typical_p >= 1.0]
        for i, token in zip(drawn, _draw_together(logits, rows, drawn), strict=True):
            tokens[i] = token
        chosen = sorted(set(chosen) - set(drawn))
    for i in chosen:
        tokens[i] = _choose(logits[i].float(), rows[i])
    tokens_by_row = [(i, token) for i, token in enumerate(tokens) if token is not None]
    wanted = [rows[i].params.num_logprobs for i, _ in tokens_by_row]
    logprobs = _logprobs(
        [logits[i] for i, _ in tokens_by_row], [token for _, token in tokens_by_row], wanted, fast
    )
    found = {i: Drawn(token, one) for (i, token), one in zip(tokens_by_row, logprobs, strict=True)}
    return [found.get(i, Drawn(None)) for i in range(len(rows))]


def _fits(row: torch.Tensor) -> bool:
    """Whether `sampling_kernels` takes rows like this one."""
    return row.device.type == "cpu" and row.dtype in (torch.bfloat16, torch.float32)


def _best(logits: list[torch.Tensor], fast: bool) -> list[int | None]:
    """Where each row is largest; None for one that is not finite."""
    if fast:
        return [place if place >= 0 else None for place in first_best(logits)]
    best, argmax = torch.stack(logits).float().max(dim=-1)
    # max() passes NaN on, and an infinity shows as the maximum (or as a maximum of -inf).
    pairs = zip(argmax.tolist(), torch.isfinite(best).tolist(), strict=True)
    return [place if is_finite else None for place, is_finite in pairs]


def logprobs_of(
    logits: torch.Tensor, token_ids: list[int], num_top: int, *, fast: bool = True
) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of given next tokens: logits (T, V), one id a row; `fast` as in `sample`."""
    fast = fast and _fits(logits) and bool(torch.isfinite(logits.max(-1)[0]).all())
    entries = _logprobs(list(logits), token_ids, [num_top] * len(token_ids), fast)
    return tuple(entry for entry in entries if entry is not None)


def _draw_together(
    logits: list[torch.Tensor], rows: list[SampleRow], drawn: list[int]
) -> list[int | None]:
    """The tokens of the rows that are drawn, by the kernel."""
    if not drawn:
        return []
    vectors: list[torch.Tensor] = []
    numbers: list[tuple[float, float, float, float, float]] = []
    for i in drawn:
        row, params = rows[i], rows[i].params
        vectors.append(_candidates(logits[i], row))
        heat = max(params.temperature, _COLDEST)
        numbers.append((heat, params.top_k, params.top_p, params.min_p, _number_of(row)))
    places = [0] * len(drawn)
    for dtype in {vector.dtype for vector in vectors}:
        some = [at for at, vector in enumerate(vectors) if vector.dtype == dtype]
        found = draw_places([vectors[at] for at in some], [numbers[at] for at in some])
        for at, place in zip(some, found, strict=True):
            places[at] = place
    tokens: list[int | None] = []
    for i, place in zip(drawn, places, strict=True):
        allowed = rows[i].allowed
        if place < 0:
            tokens.append(None)
        else:
            tokens.append(place if allowed is None else int(allowed[place]))
    return tokens


def _number_of(row: SampleRow) -> float:
    """The number in [0, 1) that decides a row's draw."""
    return uniform(row.params.seed, len(row.token_ids) - row.num_prompt_tokens)


def _logprobs(
    rows: list[torch.Tensor], tokens: list[int], wanted: SequenceType[int | None], fast: bool
) -> list[TokenLogprob | None]:
    """`_logprob` of each row, together where the kernel does it."""
    asked = [i for i, number in enumerate(wanted) if number is not None]
    found: list[TokenLogprob | None] = [None] * len(rows)
    if not fast or not asked:
        for i in asked:
            found[i] = _logprob(rows[i], tokens[i], wanted[i])
        return found
    most = min(max(wanted[i] or 0 for i in asked), rows[0].shape[-1])
    sums, largest = log_normalisers([rows[i] for i in asked], most)
    for i, log_normaliser, ids in zip(asked, sums, largest, strict=True):
        row, some = rows[i], ids[: wanted[i]]
        at = torch.tensor([tokens[i], *some])
        token, *top = (row[at].double() - log_normaliser).tolist()
        found[i] = TokenLogprob(token, tuple(zip(some, top, strict=True)))
    return found


def _is_plain(row: SampleRow) -> bool:
    return row.allowed is None and not row.params.do_sample and not _is_shifted(row.params)


def _is_shifted(params: SamplingParams) -> bool:
    """Whether its logits are changed before anything else."""
    return (
        bool(params.logit_bias)
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _logprob(logits: torch.Tensor, token: int, num_top: int | None) -> TokenLogprob | None:
    """The raw log-softmax of one row (V,) at `token`, and of its `num_top` most likely tokens."""
    if num_top is None:
        return None
    logits = logits.float()
    log_normaliser = torch.logsumexp(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = torch.topk(logits, min(num_top, logits.shape[-1]))
        top = tuple(zip(ids.tolist(), (values - log_normaliser).tolist(), strict=True))
    return TokenLogprob(float(logits[token] - log_normaliser), top)


def _candidates(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """The logits that a choice is made among, shifted: those of `allowed`, or all."""
    if _is_shifted(row.params):
        logits = _penalise(_biased(logits.to(torch.float32, copy=True), row.params), row)
    # No filter counts a token that may not be chosen.
    return logits if row.allowed is None else logits[row.allowed.to(logits.device)]


def _choose(logits: torch.Tensor, row: SampleRow) -> int:
    place = _pick(_candidates(logits, row), row)
    return place if row.allowed is None else int(row.allowed[place])


def _pick(logits: torch.Tensor, row: SampleRow) -> int:
    """The place of the chosen one among these logits (K,)."""
    if not row.params.do_sample:
        return int(logits.argmax())
    scores, ids = _filter(_tempered(logits, row.params.temperature), row.params)
    return _inverse_cdf(scores, ids, _number_of(row))


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits over temperature, less their maximum: whatever the temperature, the best stays at 0."""
    return (logits - logits.max()) / max(temperature, _COLDEST)


def _biased(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Add OpenAI's logit_bias, in place."""
    if params.logit_bias:
        ids, biases = zip(*params.logit_bias, strict=True)
        places = torch.tensor(ids, device=logits.device)
        logits[places] += torch.tensor(biases, device=logits.device, dtype=logits.dtype)
    return logits


def _penalise(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Penalties of Keskar et al. (2019, CTRL) for repetition, of OpenAI's API for the other two."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.token_ids)), device=logits.device)
        values = logits[seen].double()  # any penalty > 0 is valid: no float32 overflow, no 0 / 0
        penalty = params.repetition_penalty
        scaled = torch.where(values < 0, values * penalty, values / penalty)
        logits[seen] = scaled.clamp(-_LARGEST, _LARGEST).to(logits.dtype)
    output = row.token_ids[row.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        counts: dict[int, int] = {}
        for token in output:
            counts[token] = counts.get(token, 0) + 1
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def _filter(
    scores: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is left of one row's scores (V,): the kept scores and their token ids.

    Ids of None mean the whole vocabulary in order.
    """
    ids: torch.Tensor | None = None
    if params.top_k or params.top_p < 1.0:
        scores, ids = _top(scores, params)
    if params.min_p > 0.0:
        scores, ids = _keep(scores >= scores.max() + math.log(params.min_p), scores, ids)
    if params.typical_p < 1.0:
        scores, ids = _keep(_typical(scores, params.typical_p), scores, ids)
    return scores, ids


def _keep(
    kept: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    places = kept.nonzero().flatten()
    return scores[places], places if ids is None else ids[places]


def _top(scores: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """top_k, then top_p among what it keeps; most likely first.

    What ties with the last of the k is kept too, as transformers does it: bf16 logits tie often.
    """
    vocabulary = scores.shape[-1]
    count = min(params.top_k or CANDIDATES, vocabulary)
    values, ids = torch.topk(scores, count)
    if params.top_k and (tied := int((scores >= values[-1]).sum())) > count:
        values, ids = torch.topk(scores, tied)
    if params.top_p >= 1.0:
        return values, ids
    whole = torch.logsumexp(values if params.top_k else scores, dim=-1)
    above = _mass_above(values, whole)
    if not params.top_k and count < vocabulary and float(above[-1]) < params.top_p:
        # The nucleus may reach past the candidates: this row alone is sorted in full.
        values, ids = torch.sort(scores, descending=True)
        above = _mass_above(values, whole)
    kept = max(1, int((above < params.top_p).sum()))
    return values[:kept], ids[:kept]


def _mass_above(values: torch.Tensor, log_normaliser: torch.Tensor) -> torch.Tensor:
    """For scores in descending order: the probability of everything more likely than each."""
    mass = torch.exp(
        (values - log_normaliser).double()
    )  # float32 loses the tail of a large nucleus
    return torch.cumsum(mass, dim=-1) - mass


def _typical(scores: torch.Tensor, mass: float) -> torch.Tensor:
    """Locally typical sampling (Meister et al., 2023): which scores to keep, as a mask."""
    logprobs = torch.log_softmax(scores, dim=-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).nansum()
    distance = (-logprobs - entropy).abs()
    order = torch.argsort(distance, stable=True)
    cumulative = probs[order].cumsum(dim=-1)
    last = min(int((cumulative < mass).sum()), scores.shape[-1] - 1)
    return distance <= distance[order[last]]


def _inverse_cdf(scores: torch.Tensor, ids: torch.Tensor | None, draw: float) -> int:
    cumulative = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
    target = (cumulative[-1] * draw).reshape(1)
    place = int(torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1))
    return place if ids is None else int(ids[place])
