"""The CPU's fast path for choosing tokens: a draw and log-probabilities without a sort.

A row's scores are put into buckets by their distance from the best; only the bucket in which a filter
ends, and the one that the draw falls into, are sorted. What is kept and drawn is what `sampler` keeps and
draws: the order is that of a full sort, equal scores by their places, and without top_k and top_p that of
the vocabulary.

Compiled by numba, run on torch's own OpenMP threads: see `decode_kernel`. Knows rows of numbers; no
request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from server.engine.openmp import Kernel
from server.engine.vector_loops import VERSION, exponentials, largest, largest_or_nan
from server.engine.vector_ops import LANES, array_at, float_of_bits, take_number

_BUCKETS = 2048
# Buckets a natural unit: the last one holds everything below exp(-32) of the best.
_FINENESS = 64.0
# Scores that are passed over at once where none of them counts.
_BLOCK = 128

# Fields of a job table, int64.
(
    _NEXT_ROW, _TABLE_AT, _ROWS, _LONGEST, _ADDRESSES, _LENGTHS, _NUMBERS, _TOKENS, _NUM_TOP, _TOP_IDS,
    _SIZE,
) = range(11)  # fmt: skip
# What a row brings: temperature, top_k, top_p, min_p, draw. Float64.
_NUMBERS_A_ROW = 5


@njit
def _widen(x: Any, values: Any) -> Any:
    """Copy a row's scores as float32; the best of them, or NaN where there is one."""
    count = x.shape[0]
    for i in range(count):
        values[i] = float_of_bits(x[i])
    whole = count // LANES * LANES
    best = largest_or_nan(x.ctypes.data, whole, x) if whole else np.float32(-np.inf)
    for i in range(whole, count):
        if values[i] > best or np.isnan(values[i]):
            best = values[i]
    return best


@njit
def _best(x: Any) -> Any:
    whole = x.shape[0] // LANES * LANES
    best = largest(x.ctypes.data, whole) if whole else np.float32(-np.inf)
    for i in range(whole, x.shape[0]):
        best = max(best, x[i])
    return best


@njit(fastmath={"reassoc", "nsz"})
def _sum(x: Any, count: Any) -> Any:
    total = 0.0
    for i in range(count):
        total += np.float64(x[i])
    return total


@njit
def _exponentials(x: Any, count: Any) -> None:
    """exp of the first `count`; x is longer by a register, and the rest of that becomes 0."""
    padded = (count + LANES - 1) // LANES * LANES
    for i in range(count, padded):
        x[i] = np.float32(-np.inf)
    exponentials(x.ctypes.data, padded)


@njit
def _in_order(work: Any, count: Any, bucket: Any) -> Any:
    """Places of a bucket's members, the most likely first, equal ones as they stand."""
    scores, buckets, _, _, places, keys = work
    found = 0
    for start in range(0, count, _BLOCK):
        end = min(start + _BLOCK, count)
        held = 0
        for i in range(start, end):
            held |= buckets[i] == bucket
        if held:
            for i in range(start, end):
                if buckets[i] == bucket:
                    places[found] = i
                    keys[found] = -scores[i]
                    found += 1
    return places[:found][np.argsort(keys[:found], kind="mergesort")]


@njit
def _mass_of_count(weights: Any, work: Any, wanted: Any) -> Any:
    """Mass of the `wanted` most likely, and of what ties with the last of them."""
    scores, buckets, sizes, masses = work[0], work[1], work[2], work[3]
    sizes[:] = 0
    for i in range(weights.shape[0]):
        sizes[buckets[i]] += 1
    before, mass = 0, 0.0
    for bucket in range(_BUCKETS):
        if before + sizes[bucket] >= wanted:
            order = _in_order(work, weights.shape[0], bucket)
            last = scores[order[wanted - before - 1]]
            for place in order:
                if scores[place] < last:
                    break
                mass += weights[place]
            return mass
        before += sizes[bucket]
        mass += masses[bucket]
    return mass


@njit
def _mass_of_share(weights: Any, work: Any, wanted: Any) -> Any:
    """Mass of the shortest beginning that weighs `wanted`."""
    masses, mass = work[3], 0.0
    for bucket in range(_BUCKETS):
        if masses[bucket] > 0.0 and mass + masses[bucket] >= wanted:
            for place in _in_order(work, weights.shape[0], bucket):
                if mass >= wanted:
                    break
                mass += weights[place]
            return mass
        mass += masses[bucket]
    return mass


@njit
def _mass_of_weight(weights: Any, least: Any) -> Any:
    """Mass of all that weigh at least `least`; the best weighs one."""
    mass = 0.0
    for weight in weights:
        if weight >= least:
            mass += weight
    return mass


@njit
def _place_in_order(weights: Any, work: Any, target: Any) -> Any:
    """The first, most likely ones first, that has more than `target` before it or with it."""
    masses, mass, filled = work[3], 0.0, 0
    for bucket in range(_BUCKETS):
        if masses[bucket] > 0.0:
            if mass + masses[bucket] > target:
                last = -1
                for place in _in_order(work, weights.shape[0], bucket):
                    last = place
                    mass += weights[place]
                    if mass > target:
                        break
                return last
            filled = bucket
        mass += masses[bucket]
    # Rounding alone leads here.
    return _in_order(work, weights.shape[0], filled)[-1]


@njit
def _place_as_they_stand(weights: Any, least: Any, target: Any) -> Any:
    """The first that weighs at least `least` and has more than `target` before it or with it."""
    mass, last = 0.0, -1
    for place in range(weights.shape[0]):
        if weights[place] >= least:
            last = place
            mass += weights[place]
            if mass > target:
                break
    return last


@njit
def _sort_into_buckets(weights: Any, work: Any) -> None:
    scores, buckets, masses = work[0], work[1], work[3]
    for i in range(weights.shape[0]):
        distance = -scores[i] * np.float32(_FINENESS)
        # Not min(): NaN must not become an index.
        near = distance < np.float32(_BUCKETS - 1)
        buckets[i] = np.int32(distance) if near else np.int32(_BUCKETS - 1)
    masses[:] = 0.0
    for i in range(weights.shape[0]):
        masses[buckets[i]] += weights[i]


@njit
def _draw(x: Any, numbers: Any, weights: Any, work: Any) -> Any:
    """The place drawn from one row; -1 where its numbers allow no choice."""
    temperature, top_k, top_p, min_p, number = numbers
    scores, count, heat = work[0], x.shape[0], np.float32(temperature)
    best = _widen(x, scores)
    for i in range(count):
        scores[i] = (scores[i] - best) / heat
        weights[i] = scores[i]
    _exponentials(weights, count)
    weights = weights[:count]
    least = np.float32(min_p)
    if not np.isfinite(best) or np.isnan(_sum(weights, count)):
        return -1
    if top_k == 0 and top_p >= 1.0:
        mass = _mass_of_weight(weights, least)
        return _place_as_they_stand(weights, least, number * mass)
    _sort_into_buckets(weights, work)
    mass = work[3].sum()
    if 0 < top_k < count:
        mass = _mass_of_count(weights, work, np.int64(top_k))
    if top_p < 1.0:
        mass = min(mass, _mass_of_share(weights, work, top_p * mass))
    if min_p > 0.0:
        mass = min(mass, _mass_of_weight(weights, least))
    return _place_in_order(weights, work, number * mass)


@njit
def _draw_rows(table: Any, like: Any) -> None:
    addresses = carray(array_at(table[_ADDRESSES]), (table[_ROWS],), np.int64)
    lengths = carray(array_at(table[_LENGTHS]), (table[_ROWS],), np.int64)
    tokens = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)
    numbers = carray(array_at(table[_NUMBERS]), (table[_ROWS], _NUMBERS_A_ROW), np.float64)
    longest = table[_LONGEST]
    weights = np.empty(longest + LANES, np.float32)
    # Scores, their buckets, the buckets' sizes and masses, and room to sort one in.
    work = (
        np.empty(longest, np.float32),
        np.empty(longest, np.int32),
        np.empty(_BUCKETS, np.int64),
        np.empty(_BUCKETS, np.float64),
        np.empty(longest, np.int64),
        np.empty(longest, np.float32),
    )
    row = take_number(table[_TABLE_AT])
    while row < table[_ROWS]:
        x = carray(array_at(addresses[row]), (lengths[row],), like.dtype)
        tokens[row] = _draw(x, numbers[row], weights, work)
        row = take_number(table[_TABLE_AT])


@njit
def _insert(x: Any, ids: Any, found: Any, place: Any) -> None:
    at = min(found, ids.shape[0] - 1)
    while at > 0 and x[ids[at - 1]] < x[place]:
        ids[at] = ids[at - 1]
        at -= 1
    ids[at] = place


@njit
def _largest(x: Any, ids: Any) -> None:
    """Places of the len(ids) largest, the largest first, equal ones as they stand."""
    count, found, least = ids.shape[0], 0, np.float32(-np.inf)
    for start in range(0, x.shape[0], _BLOCK):
        block = x[start : start + _BLOCK]
        if found == count and _best(block) <= least:
            continue
        for place in range(start, start + block.shape[0]):
            if found < count or x[place] > least:
                _insert(x, ids, found, place)
                found = min(found + 1, count)
                least = x[ids[found - 1]]


@njit
def _normalise_rows(table: Any, like: Any) -> None:
    """Log of the sum of exp of each row, and its largest scores."""
    addresses = carray(array_at(table[_ADDRESSES]), (table[_ROWS],), np.int64)
    sums = carray(array_at(table[_NUMBERS]), (table[_ROWS],), np.float64)
    top_ids = carray(array_at(table[_TOP_IDS]), (table[_ROWS], table[_NUM_TOP]), np.int64)
    count = table[_LONGEST]
    values = np.empty(count, np.float32)
    scores = np.empty(count + LANES, np.float32)
    row = take_number(table[_TABLE_AT])
    while row < table[_ROWS]:
        best = _widen(carray(array_at(addresses[row]), (count,), like.dtype), values)
        for i in range(count):
            scores[i] = values[i] - best
        _exponentials(scores, count)
        sums[row] = np.float64(best) + np.log(_sum(scores, count))
        if table[_NUM_TOP]:
            _largest(values, top_ids[row])
        row = take_number(table[_TABLE_AT])


@njit
def _first_best_rows(table: Any, like: Any) -> None:
    """The place of each row's largest, the first of equals; -1 where it is not finite."""
    addresses = carray(array_at(table[_ADDRESSES]), (table[_ROWS],), np.int64)
    places = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)
    count = table[_LONGEST]
    whole = count // LANES * LANES
    row = take_number(table[_TABLE_AT])
    while row < table[_ROWS]:
        x = carray(array_at(addresses[row]), (count,), like.dtype)
        best = np.float32(-np.inf)
        if whole:
            best = largest_or_nan(addresses[row], whole, like)
        for i in range(whole, count):
            value = float_of_bits(x[i])
            if value > best or np.isnan(value):
                best = value
        places[row] = -1
        if np.isfinite(best):
            place = 0
            while float_of_bits(x[place]) != best:
                place += 1
            places[row] = place
        row = take_number(table[_TABLE_AT])


@cache
def _first_best(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    if dtype == torch.bfloat16:

        @cfunc(types.void(types.voidptr), cache=True)
        def first_best_bf16(table_at: Any) -> None:
            if version:
                _first_best_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(first_best_bf16)

    @cfunc(types.void(types.voidptr), cache=True)
    def first_best_float32(table_at: Any) -> None:
        if version:
            _first_best_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(first_best_float32)


@cache
def _draw_entry(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    if dtype == torch.bfloat16:

        @cfunc(types.void(types.voidptr), cache=True)
        def draw_bf16(table_at: Any) -> None:
            if version:
                _draw_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(draw_bf16)

    @cfunc(types.void(types.voidptr), cache=True)
    def draw_float32(table_at: Any) -> None:
        if version:
            _draw_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(draw_float32)


@cache
def _normalise_entry(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    if dtype == torch.bfloat16:

        @cfunc(types.void(types.voidptr), cache=True)
        def normalise_bf16(table_at: Any) -> None:
            if version:
                _normalise_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(normalise_bf16)

    @cfunc(types.void(types.voidptr), cache=True)
    def normalise_float32(table_at: Any) -> None:
        if version:
            _normalise_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(normalise_float32)


def prepare(dtype: torch.dtype) -> None:
    """Compile everything now for logits of this dtype, so that no request waits for it."""
    _first_best(dtype)
    _normalise_entry(dtype)
    for each in {dtype, torch.float32}:  # logits that were shifted are float32
        _draw_entry(each)


def first_best(rows: Sequence[torch.Tensor]) -> list[int]:
    """Where the largest of each row is, the first of equal ones; -1 where a row is not finite.

    Args:
        rows: at least one, (V,) each, bfloat16 or float32 on the CPU, of one length V >= 1. A row of
            -inf alone, with +inf or with NaN anywhere is not finite.
    """
    dense = [row.contiguous() for row in rows]
    addresses = np.array([row.data_ptr() for row in dense], dtype=np.int64)
    places = np.zeros(len(dense), dtype=np.int64)
    table = np.zeros(_SIZE, dtype=np.int64)
    table[[_ADDRESSES, _TOKENS]] = addresses.ctypes.data, places.ctypes.data
    table[[_ROWS, _LONGEST, _TABLE_AT]] = len(dense), len(dense[0]), table.ctypes.data
    _first_best(dense[0].dtype).run(table.ctypes.data, len(dense))
    return [int(place) for place in places]


def draw_places(
    rows: Sequence[torch.Tensor], numbers: Sequence[tuple[float, float, float, float, float]]
) -> list[int]:
    """One place of each row, drawn.

    Args:
        rows: logits (N,), bfloat16 or float32 on the CPU, all of one dtype, N >= 1; lengths may differ.
        numbers: of each row temperature > 0, top_k (0: all), top_p, min_p, and a number in [0, 1).

    Returns:
        Where the cumulative distribution of what the filters keep, in descending order, exceeds that
        number; -1 where its numbers allow no choice.
    """
    dense = [row.contiguous() for row in rows]
    addresses = np.array([row.data_ptr() for row in dense], dtype=np.int64)
    lengths = np.array([len(row) for row in dense], dtype=np.int64)
    given = np.array(numbers, dtype=np.float64)
    places = np.zeros(len(dense), dtype=np.int64)
    table = np.zeros(_SIZE, dtype=np.int64)
    table[[_ADDRESSES, _LENGTHS]] = addresses.ctypes.data, lengths.ctypes.data
    table[[_NUMBERS, _TOKENS]] = given.ctypes.data, places.ctypes.data
    table[[_ROWS, _LONGEST, _TABLE_AT]] = len(dense), lengths.max(), table.ctypes.data
    _draw_entry(dense[0].dtype).run(table.ctypes.data, len(dense))
    return places.tolist()


def log_normalisers(
    rows: Sequence[torch.Tensor], num_top: int
) -> tuple[list[float], list[list[int]]]:
    """Log-sum-exp of each row, and the places of its `num_top` largest, the largest first.

    Args:
        rows: logits (V,), bfloat16 or float32 on the CPU, all of one dtype and length, the largest
            finite, none NaN.
        num_top: at most V.
    """
    dense = [row.contiguous() for row in rows]
    addresses = np.array([row.data_ptr() for row in dense], dtype=np.int64)
    sums = np.zeros(len(dense))
    top = np.zeros((len(dense), num_top), dtype=np.int64)
    table = np.zeros(_SIZE, dtype=np.int64)
    table[[_ADDRESSES, _NUMBERS]] = addresses.ctypes.data, sums.ctypes.data
    table[[_NUM_TOP, _TOP_IDS]] = num_top, top.ctypes.data
    table[[_ROWS, _LONGEST, _TABLE_AT]] = len(dense), len(dense[0]), table.ctypes.data
    _normalise_entry(dense[0].dtype).run(table.ctypes.data, len(dense))
    return sums.tolist(), top.tolist()
