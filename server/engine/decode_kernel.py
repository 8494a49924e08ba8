"""The CPU's fast path for single-token rows: attention straight over the KV blocks.

The plain path gathers every row's blocks into one tensor and pads them; this kernel reads them where
they lie, whatever their number, and reads bf16 as its bits. It is compiled by numba, so no compiler is
needed on the machine. Each (row, KV head) is one job: float32 throughout, in a fixed order, so that a
row's result does not depend on the others. It also puts the row's own new key and value in place,
which saves two scattered writes a layer.

The jobs run on torch's own OpenMP threads. A second pool beside it (numba's) was measured: its
threads and torch's spin against each other, and a layer cost more than with one thread.

Knows KV blocks and the planned tables; not sequences, adapters or the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from server.engine.kv_cache import KVBlocks
from server.engine.openmp import torch_openmp
from server.engine.vector_ops import (
    LANES,
    WIDE,
    array_at,
    dot,
    float_of_bits,
    round_like,
    take_number,
    weighted_sum_narrow,
    weighted_sum_wide,
)

# reassoc and friends let loops vectorise; infinities and NaN keep their meaning.
_FLAGS = {"contract", "reassoc", "nsz"}

# Fields of a job table, int64: addresses, then sizes, then the number of the next job to take.
(
    _QUERY, _NEW_KEYS, _NEW_VALUES, _OUT, _KEYS, _VALUES, _BLOCKS, _FIRST, _FILLED, _COUNTS,
    _POSITIONS, _TOKENS, _SLOPES, _SCALES, _ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _MAX_BLOCKS,
    _BLOCK_SIZE, _TOKEN_STRIDE, _HEAD_STRIDE, _KEY_TOKEN_STRIDE, _KEY_HEAD_STRIDE,
    _VALUE_TOKEN_STRIDE, _VALUE_HEAD_STRIDE, _WINDOW, _NEXT_JOB, _TABLE_AT, _TABLE_SIZE,
) = range(30)  # fmt: skip


@njit(fastmath=_FLAGS, inline="always")
def _exp(x: Any) -> Any:
    """exp(x) for x <= 0 in float32: Cephes' expf, in operations that vectorise."""
    x = max(x, np.float32(-87.0))
    n = np.float32(math.floor(x * np.float32(1.44269504) + np.float32(0.5)))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * float_of_bits((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(fastmath=_FLAGS)
def _softmax(scores: Any, count: Any) -> None:
    best = np.float32(-np.inf)
    for i in range(count):
        best = max(best, scores[i])
    for i in range(count):
        scores[i] = _exp(scores[i] - best)
    total = np.float32(0.0)
    for i in range(count):
        total += scores[i]
    inverse = np.float32(1.0) / total
    for i in range(count):
        scores[i] *= inverse


@njit(fastmath=_FLAGS)
def _visible(begin: Any, filled: Any, position: Any, window: Any) -> Any:
    """Slots [skip, count) of a block that a query at `position` sees."""
    count = min(filled, position + 1 - begin)
    skip = 0 if window == 0 else max(0, position - window + 1 - begin)
    return min(skip, max(count, 0)), max(count, 0)


@njit(fastmath=_FLAGS)
def _row_of(table: Any, row: Any) -> Any:
    """One row's block ids, first positions and key counts, how many blocks, and its position."""
    line, width = row * table[_MAX_BLOCKS] * 8, table[_MAX_BLOCKS]
    blocks = carray(array_at(table[_BLOCKS] + line), (width,), np.int64)
    first = carray(array_at(table[_FIRST] + line), (width,), np.int64)
    filled = carray(array_at(table[_FILLED] + line), (width,), np.int64)
    position = carray(array_at(table[_POSITIONS]), (table[_ROWS],), np.int64)[row]
    num_blocks = carray(array_at(table[_COUNTS]), (table[_ROWS],), np.int64)[row]
    return blocks, first, filled, num_blocks, position


@njit(fastmath=_FLAGS)
def _scores_of(table: Any, row: Any, head: Any, query_at: Any, scores: Any, like: Any) -> Any:
    """Scores of one query head against every key that it sees; returns how many."""
    kv_heads, size, head_dim = table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM]
    kv_head = head // (table[_HEADS] // kv_heads)
    blocks, first, filled, num_blocks, position = _row_of(table, row)
    slope = carray(array_at(table[_SLOPES]), (table[_HEADS],), np.float32)[head]
    softcap = np.float32(carray(array_at(table[_SCALES]), (2,), np.float64)[1])
    row_bytes = head_dim * like.itemsize
    seen = 0
    for index in range(num_blocks):
        skip, count = _visible(first[index], filled[index], position, table[_WINDOW])
        keys_at = table[_KEYS] + (blocks[index] * kv_heads + kv_head) * size * row_bytes
        for slot in range(skip, count):
            score = dot(query_at, keys_at + slot * row_bytes, head_dim, like)
            if softcap != np.float32(0.0):
                score = softcap * np.float32(math.tanh(score / softcap))
            scores[seen] = score + slope * np.float32(first[index] + slot - position)
            seen += 1
    return seen


@njit(fastmath=_FLAGS)
def _add_values(table: Any, row: Any, head: Any, weights_at: Any, sums_at: Any, like: Any) -> None:
    """Add the weighted values of every key that the row sees to `head_dim` sums."""
    kv_heads, size, head_dim = table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM]
    kv_head = head // (table[_HEADS] // kv_heads)
    blocks, first, filled, num_blocks, position = _row_of(table, row)
    row_bytes = head_dim * like.itemsize
    for index in range(num_blocks):
        skip, count = _visible(first[index], filled[index], position, table[_WINDOW])
        number = count - skip
        if number == 0:
            continue
        block_at = table[_VALUES] + (blocks[index] * kv_heads + kv_head) * size * row_bytes
        values_at = block_at + skip * row_bytes
        done = 0
        while done + WIDE <= head_dim:
            at, to = values_at + done * like.itemsize, sums_at + done * 4
            weighted_sum_wide(weights_at, at, number, to, row_bytes, like)
            done += WIDE
        while done < head_dim:
            at, to = values_at + done * like.itemsize, sums_at + done * 4
            weighted_sum_narrow(weights_at, at, number, to, row_bytes, like)
            done += LANES
        weights_at += number * 4


@njit(fastmath=_FLAGS)
def _attend_head(table: Any, row: Any, head: Any, scores: Any, scratch: Any, like: Any) -> None:
    """One query head of one row; `scratch` holds the scaled query and the sums, head_dim each."""
    head_dim = table[_HEAD_DIM]
    scale = np.float32(carray(array_at(table[_SCALES]), (2,), np.float64)[0])
    token = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)[row]
    at_query = token * table[_TOKEN_STRIDE] + head * table[_HEAD_STRIDE]
    at_out = (token * table[_HEADS] + head) * head_dim
    query = carray(array_at(table[_QUERY] + at_query * like.itemsize), (head_dim,), like.dtype)
    out = carray(array_at(table[_OUT] + at_out * like.itemsize), (head_dim,), like.dtype)
    for d in range(head_dim):
        scratch[d] = float_of_bits(query[d]) * scale
        scratch[head_dim + d] = np.float32(0.0)
    query_at = scratch.ctypes.data
    sums_at = query_at + head_dim * 4
    seen = _scores_of(table, row, head, query_at, scores, like)
    _softmax(scores, seen)
    _add_values(table, row, head, scores.ctypes.data, sums_at, like)
    for d in range(head_dim):
        out[d] = round_like(scratch[head_dim + d], out[d])


@njit
def _write_new(table: Any, row: Any, kv_head: Any, like: Any) -> None:
    """Put the row's new key and value of one KV head into the last slot of its last block."""
    kv_heads, size, head_dim = table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM]
    token = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)[row]
    last = carray(array_at(table[_COUNTS]), (table[_ROWS],), np.int64)[row] - 1
    at = row * table[_MAX_BLOCKS] + last
    shape = (table[_ROWS] * table[_MAX_BLOCKS],)
    block = carray(array_at(table[_BLOCKS]), shape, np.int64)[at]
    slot = carray(array_at(table[_FILLED]), shape, np.int64)[at] - 1
    to = ((block * kv_heads + kv_head) * size + slot) * head_dim * like.itemsize
    key_from = token * table[_KEY_TOKEN_STRIDE] + kv_head * table[_KEY_HEAD_STRIDE]
    value_from = token * table[_VALUE_TOKEN_STRIDE] + kv_head * table[_VALUE_HEAD_STRIDE]
    new_keys_at = table[_NEW_KEYS] + key_from * like.itemsize
    new_values_at = table[_NEW_VALUES] + value_from * like.itemsize
    new_key = carray(array_at(new_keys_at), (head_dim,), like.dtype)
    new_value = carray(array_at(new_values_at), (head_dim,), like.dtype)
    key = carray(array_at(table[_KEYS] + to), (head_dim,), like.dtype)
    value = carray(array_at(table[_VALUES] + to), (head_dim,), like.dtype)
    for d in range(head_dim):
        key[d] = new_key[d]
        value[d] = new_value[d]


@njit(fastmath=_FLAGS)
def _take_jobs(table: Any, like: Any) -> None:
    """Take (row, KV head) jobs until none is left; any number of threads may do so at once."""
    scores = np.empty(table[_MAX_BLOCKS] * table[_BLOCK_SIZE], np.float32)
    scratch = np.empty(2 * table[_HEAD_DIM], np.float32)
    kv_heads = table[_KV_HEADS]
    group = table[_HEADS] // kv_heads
    next_job_at = table[_TABLE_AT] + _NEXT_JOB * 8
    job = take_number(next_job_at)
    while job < table[_ROWS] * kv_heads:
        _write_new(table, job // kv_heads, job % kv_heads, like)
        for head in range((job % kv_heads) * group, (job % kv_heads + 1) * group):
            _attend_head(table, job // kv_heads, head, scores, scratch, like)
        job = take_number(next_job_at)


@cfunc(types.void(types.voidptr), cache=True)
def _run_bf16(table_at: Any) -> None:
    _take_jobs(carray(table_at, (_TABLE_SIZE,), np.int64), np.zeros(1, np.uint16))


@cfunc(types.void(types.voidptr), cache=True)
def _run_float32(table_at: Any) -> None:
    _take_jobs(carray(table_at, (_TABLE_SIZE,), np.int64), np.zeros(1, np.float32))


_RUN = {torch.bfloat16: _run_bf16, torch.float32: _run_float32}


class DecodeKernel:
    """Plans and runs the kernel over one engine's blocks."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._sizes = blocks.keys[0].shape[1:]  # H_kv, block_size, D
        self._keys = [layer.data_ptr() for layer in blocks.keys]
        self._values = [layer.data_ptr() for layer in blocks.values]
        # Held, so that the addresses above stay good.
        self._blocks = blocks
        self._run = _RUN[blocks.keys[0].dtype]

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether the kernel serves this device, dtype and head size."""
        return device.type == "cpu" and dtype in _RUN and head_dim % LANES == 0

    def plan(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ) -> Callable[..., None]:
        """Bind one step's single-token rows.

        Args:
            tokens: (R,) int64, their indices in the packed row.
            positions: (R,) int64, their absolute positions.
            tables: for each row its block ids, first positions and key counts, each (N,).

        Returns:
            `AttentionPath.fast` for this step.
        """
        counts = np.array([len(ids) for ids, _, _ in tables])
        padded = np.zeros((3, len(tables), int(counts.max())), dtype=np.int64)
        for row, parts in enumerate(tables):
            for side, part in enumerate(parts):
                padded[side, row, : counts[row]] = part
        held = (tokens.copy(), positions.copy(), counts, padded)
        table = np.zeros(_TABLE_SIZE, dtype=np.int64)
        scales = np.zeros(2)
        table[[_TOKENS, _POSITIONS, _COUNTS]] = [array.ctypes.data for array in held[:3]]
        table[[_BLOCKS, _FIRST, _FILLED]] = [part.ctypes.data for part in padded]
        table[[_ROWS, _MAX_BLOCKS]] = padded.shape[1:]
        table[[_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM]] = self._sizes
        table[[_SCALES, _TABLE_AT]] = scales.ctypes.data, table.ctypes.data

        def run(
            layer: int,
            query: torch.Tensor,
            new_keys: torch.Tensor,
            new_values: torch.Tensor,
            out: torch.Tensor,
            scale: float,
            window: int | None,
            softcap: float | None,
            alibi_slopes: torch.Tensor | None,
            _held: tuple[np.ndarray, ...] = held,
        ) -> None:
            heads = query.shape[1]
            slopes = np.zeros(heads, np.float32)
            if alibi_slopes is not None:
                slopes[:] = alibi_slopes.numpy()
            query, new_keys, new_values = map(_with_dense_rows, (query, new_keys, new_values))
            table[[_QUERY, _OUT]] = query.data_ptr(), out.data_ptr()
            table[[_NEW_KEYS, _NEW_VALUES]] = new_keys.data_ptr(), new_values.data_ptr()
            table[[_KEY_TOKEN_STRIDE, _KEY_HEAD_STRIDE]] = new_keys.stride()[:2]
            table[[_VALUE_TOKEN_STRIDE, _VALUE_HEAD_STRIDE]] = new_values.stride()[:2]
            table[[_KEYS, _VALUES]] = self._keys[layer], self._values[layer]
            table[[_SLOPES, _HEADS]] = slopes.ctypes.data, heads
            table[[_TOKEN_STRIDE, _HEAD_STRIDE]] = query.stride(0), query.stride(1)
            table[[_WINDOW, _NEXT_JOB]] = window or 0, 0
            scales[:] = scale, softcap or 0.0
            self._start(table)

        return run

    def _start(self, table: np.ndarray) -> None:
        threads, openmp = torch.get_num_threads(), torch_openmp()
        if threads == 1 or openmp is None:
            self._run.ctypes(table.ctypes.data)
        else:
            openmp.GOMP_parallel(self._run.address, table.ctypes.data, threads, 0)


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as it is if D is dense, else a copy."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
