"""The CPU's fast path for single-token rows: attention straight over the KV blocks.

The plain path gathers every row's blocks into one tensor and pads them; this kernel reads them where
they lie, whatever their number, and reads bf16 as its bits. It is compiled by numba, so no compiler is
needed on the machine. Each (row, KV head) is one job: float32 throughout, in a fixed order, so that a
row's result does not depend on the others. It also puts the row's own new key and value in place,
which saves two scattered writes a layer.

The jobs run on torch's own OpenMP threads. A second pool beside it (numba's) was measured: its
threads and torch's spin against each other, and a layer cost more than with one thread. Query heads
of one KV head go together, and a block is asked for while the one before it is scored: 32 rows of 112
keys took 10 ms a step on one thread where they took 18.5. Asking two or three blocks ahead was no faster.

Knows KV blocks and the planned tables; not sequences, adapters or the model.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from server.engine.kv_cache import BlockTable, KVBlocks
from server.engine.openmp import Kernel
from server.engine.prefix_attention import PrefixAttention, PrefixPlan, SharedPrefix
from server.engine.vector_loops import (
    HEADS,
    KEYS,
    VERSION,
    WIDE,
    dots,
    dots_of_keys,
    prefetch,
    softmax,
    weighted_sums,
    weighted_sums_wide,
)
from server.engine.vector_ops import LANES, array_at, float_of_bits, round_like, take_number

# Query heads of a model at most, for those that have no slopes.
_MOST_HEADS = 1024
# reassoc and friends let loops vectorise; infinities and NaN keep their meaning.
_FLAGS = {"contract", "reassoc", "nsz"}

# Fields of a job table, int64: the number of the next job to take, then addresses, then sizes.
(
    _NEXT_JOB, _QUERY, _NEW_KEYS, _NEW_VALUES, _OUT, _KEYS, _VALUES, _BLOCKS, _FIRST, _FILLED, _COUNTS,
    _POSITIONS, _TOKENS, _SLOPES, _SCALES, _ROWS, _HEADS, _KV_HEADS, _HEAD_DIM, _MAX_BLOCKS,
    _BLOCK_SIZE, _TOKEN_STRIDE, _HEAD_STRIDE, _KEY_TOKEN_STRIDE, _KEY_HEAD_STRIDE,
    _VALUE_TOKEN_STRIDE, _VALUE_HEAD_STRIDE, _WINDOW, _BENT, _TABLE_AT, _LINES,
    _OWN_BLOCKS, _OWN_SLOTS, _WORK, _BLOCK_BYTES, _PREFIXES, _PREFIX_PLACES, TABLE_SIZE,
) = range(38)  # fmt: skip

# What is done with a row, in `_WORK`: its key and value put in place, attention, or both at once.
_PUT, _ATTEND, _BOTH = 1, 2, 3
_TOGETHER = 8


@njit(fastmath=_FLAGS)
def _visible(begin: Any, filled: Any, position: Any, window: Any) -> Any:
    """Slots [skip, count) of a block that a query at `position` sees."""
    count = min(filled, position + 1 - begin)
    skip = 0 if window == 0 else max(0, position - window + 1 - begin)
    return min(skip, max(count, 0)), max(count, 0)


@njit(fastmath=_FLAGS)
def _row_of(table: Any, row: Any) -> Any:
    """One row's block ids, first positions and key counts, how many blocks, and its position."""
    number = carray(array_at(table[_LINES]), (table[_ROWS],), np.int64)[row]
    line, width = number * table[_MAX_BLOCKS] * 8, table[_MAX_BLOCKS]
    blocks = carray(array_at(table[_BLOCKS] + line), (width,), np.int64)
    first = carray(array_at(table[_FIRST] + line), (width,), np.int64)
    filled = carray(array_at(table[_FILLED] + line), (width,), np.int64)
    position = carray(array_at(table[_POSITIONS]), (table[_ROWS],), np.int64)[row]
    num_blocks = carray(array_at(table[_COUNTS] + number * 8), (1,), np.int64)[0]
    return blocks, first, filled, num_blocks, position


@njit(fastmath=_FLAGS)
def _bend(table: Any, scores: Any, head: Any, first: Any, position: Any) -> None:
    """Softcap and ALiBi of one head's scores against keys that stand together."""
    slope = carray(array_at(table[_SLOPES]), (table[_HEADS],), np.float32)[head]
    softcap = np.float32(carray(array_at(table[_SCALES]), (2,), np.float64)[1])
    for index in range(len(scores)):
        score = scores[index]
        if softcap != np.float32(0.0):
            score = softcap * np.float32(math.tanh(score / softcap))
        scores[index] = score + slope * np.float32(first + index - position)


@njit(fastmath=_FLAGS)
def _score_heads(table: Any, row: Any, head: Any, heads: Any, work: Any, like: Any) -> Any:
    """Scores of query heads of one KV head against every key that they see; returns how many."""
    kv_heads, size, head_dim = table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM]
    kv_head = head // (table[_HEADS] // kv_heads)
    blocks, first, filled, num_blocks, position = _row_of(table, row)
    row_bytes = head_dim * like.itemsize
    queries, scores = work[0].ctypes.data, work[2]
    query_bytes, score_bytes = head_dim * 4, scores.shape[1] * 4
    seen = 0
    for index in range(num_blocks):
        skip, count = _visible(first[index], filled[index], position, table[_WINDOW])
        block_bytes = size * row_bytes
        at_head = blocks[index] * table[_BLOCK_BYTES] + kv_head * block_bytes
        keys_at = table[_KEYS] + at_head
        # Blocks lie anywhere: the hardware does not foresee the next one.
        prefetch(table[_VALUES] + at_head, block_bytes)
        if index + 1 < num_blocks:
            following = blocks[index + 1] * table[_BLOCK_BYTES] + kv_head * block_bytes
            prefetch(table[_KEYS] + following, block_bytes)
        begin, slot = seen, skip
        while slot + KEYS <= count:
            at, to = keys_at + slot * row_bytes, scores.ctypes.data + seen * 4
            dots_of_keys(
                heads, queries, query_bytes, at, row_bytes, head_dim, to, score_bytes, like
            )
            slot += KEYS
            seen += KEYS
        while slot < count:
            at, to = keys_at + slot * row_bytes, scores.ctypes.data + seen * 4
            dots(heads, queries, query_bytes, at, row_bytes, head_dim, to, score_bytes, like)
            slot += 1
            seen += 1
        if table[_BENT] and seen > begin:
            for number in range(heads):
                some = scores[number, begin:seen]
                _bend(table, some, head + number, first[index] + skip, position)
    return seen


@njit(fastmath=_FLAGS)
def _add_values(table: Any, row: Any, head: Any, heads: Any, work: Any, like: Any) -> None:
    """Add the weighted values of every key that the row sees to each head's `head_dim` sums."""
    kv_heads, size, head_dim = table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM]
    kv_head = head // (table[_HEADS] // kv_heads)
    blocks, first, filled, num_blocks, position = _row_of(table, row)
    row_bytes = head_dim * like.itemsize
    sums_at, weights_at = work[1].ctypes.data, work[2].ctypes.data
    sum_bytes, weight_bytes = head_dim * 4, work[2].shape[1] * 4
    for index in range(num_blocks):
        skip, count = _visible(first[index], filled[index], position, table[_WINDOW])
        number = count - skip
        if number == 0:
            continue
        values_at = table[_VALUES] + blocks[index] * table[_BLOCK_BYTES]
        values_at += (kv_head * size + skip) * row_bytes
        done = 0
        while done + WIDE <= head_dim:
            at, to = values_at + done * like.itemsize, sums_at + done * 4
            weighted_sums_wide(
                heads, weights_at, weight_bytes, at, row_bytes, number, to, sum_bytes, like
            )
            done += WIDE
        while done < head_dim:
            at, to = values_at + done * like.itemsize, sums_at + done * 4
            weighted_sums(
                heads, weights_at, weight_bytes, at, row_bytes, number, to, sum_bytes, like
            )
            done += LANES
        weights_at += number * 4


@njit
def _prefix_of(table: Any, row: Any, head: Any, heads: Any) -> Any:
    """What `prefix_attention` found for a row's heads, (heads, head_dim + LANES); none without a prefix."""
    width = table[_HEAD_DIM] + LANES
    place = -1
    if table[_PREFIXES]:
        place = carray(array_at(table[_PREFIX_PLACES]), (table[_ROWS],), np.int64)[row]
    at = table[_PREFIXES] + (place * table[_HEADS] + head) * width * 4
    return carray(array_at(at), (heads if place >= 0 else 0, width), np.float32)


@njit(fastmath=_FLAGS)
def _attend_heads(table: Any, row: Any, head: Any, heads: Any, work: Any, like: Any) -> None:
    """`heads` query heads of one row and one KV head, from `head` on.

    `work` holds scaled queries and sums, (HEADS, head_dim) each, and scores (HEADS, keys), float32.
    """
    head_dim = table[_HEAD_DIM]
    scale = np.float32(carray(array_at(table[_SCALES]), (2,), np.float64)[0])
    token = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)[row]
    queries, sums, scores = work
    for number in range(heads):
        at_query = token * table[_TOKEN_STRIDE] + (head + number) * table[_HEAD_STRIDE]
        query = carray(array_at(table[_QUERY] + at_query * like.itemsize), (head_dim,), like.dtype)
        for d in range(head_dim):
            queries[number, d] = float_of_bits(query[d]) * scale
            sums[number, d] = np.float32(0.0)
    seen = _score_heads(table, row, head, heads, work, like)
    # A prefix that was attended already counts as one key more: what all of its keys weigh together.
    prefix = _prefix_of(table, row, head, heads)
    for number in range(len(prefix)):
        scores[number, seen] = prefix[number, head_dim]
    seen += min(len(prefix), 1)
    padded = (seen + LANES - 1) // LANES * LANES
    for number in range(heads):
        for index in range(seen, padded):
            scores[number, index] = np.float32(-np.inf)
        softmax(scores[number].ctypes.data, padded)
    _add_values(table, row, head, heads, work, like)
    for number in range(len(prefix)):
        for d in range(head_dim):
            sums[number, d] += scores[number, seen - 1] * prefix[number, d]
    for number in range(heads):
        at_out = (token * table[_HEADS] + head + number) * head_dim
        out = carray(array_at(table[_OUT] + at_out * like.itemsize), (head_dim,), like.dtype)
        for d in range(head_dim):
            out[d] = round_like(sums[number, d], out[d])


@njit
def _write_new(table: Any, row: Any, kv_head: Any, like: Any) -> None:
    """Put the row's new key and value of one KV head into its own slot."""
    size, head_dim = table[_BLOCK_SIZE], table[_HEAD_DIM]
    token = carray(array_at(table[_TOKENS]), (table[_ROWS],), np.int64)[row]
    block = carray(array_at(table[_OWN_BLOCKS]), (table[_ROWS],), np.int64)[row]
    slot = carray(array_at(table[_OWN_SLOTS]), (table[_ROWS],), np.int64)[row]
    to = block * table[_BLOCK_BYTES] + (kv_head * size + slot) * head_dim * like.itemsize
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


@njit
def _take_puts(table: Any, like: Any) -> None:
    """Put new keys and values in place, those of `_TOGETHER` rows at a time: each is little work."""
    first = take_number(table[_TABLE_AT] + _NEXT_JOB * 8) * _TOGETHER
    while first < table[_ROWS]:
        for row in range(first, min(first + _TOGETHER, table[_ROWS])):
            for kv_head in range(table[_KV_HEADS]):
                _write_new(table, row, kv_head, like)
        first = take_number(table[_TABLE_AT] + _NEXT_JOB * 8) * _TOGETHER


@njit(fastmath=_FLAGS)
def _take_jobs(table: Any, like: Any) -> None:
    """Take (row, KV head) jobs until none is left; any number of threads may do so at once."""
    width = (table[_MAX_BLOCKS] * table[_BLOCK_SIZE] + 1 + LANES - 1) // LANES * LANES
    queries = np.empty((HEADS, table[_HEAD_DIM]), np.float32)
    work = (queries, np.empty_like(queries), np.empty((HEADS, width), np.float32))
    kv_heads = table[_KV_HEADS]
    group = table[_HEADS] // kv_heads
    next_job_at = table[_TABLE_AT] + _NEXT_JOB * 8
    job = take_number(next_job_at)
    while job < table[_ROWS] * kv_heads:
        if table[_WORK] & _PUT:
            _write_new(table, job // kv_heads, job % kv_heads, like)
        done = 0
        while done < group:
            heads = min(HEADS, group - done)
            head = (job % kv_heads) * group + done
            _attend_heads(table, job // kv_heads, head, heads, work, like)
            done += heads
        job = take_number(next_job_at)


@njit
def _run(table: Any, like: Any) -> None:
    if table[_WORK] == _PUT:
        _take_puts(table, like)
    else:
        _take_jobs(table, like)


@cache
def _entry(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""
    if dtype == torch.bfloat16:

        @cfunc(types.void(types.voidptr), cache=True)
        def run_bf16(table_at: Any) -> None:
            if version:
                _run(carray(table_at, (TABLE_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(run_bf16)

    @cfunc(types.void(types.voidptr), cache=True)
    def run_float32(table_at: Any) -> None:
        if version:
            _run(carray(table_at, (TABLE_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(run_float32)


@dataclass(frozen=True)
class KernelRows:
    """Tokens of a step, and what each of them sees.

    Attributes:
        tokens: (R,) int64, their indices in the packed row.
        positions: (R,) int64, their absolute positions.
        lines: (R,) int64, which of `tables` each of them reads.
        blocks, slots: (R,) int64, where each one's own key and value go.
        tables: what each line sees. A row sees the keys up to its own position.
        num_attended: the first so many are attended here, of the others only keys and values are put
            in place.
        are_alone: each row is another sequence's, and all of them are attended here: none sees what
            another puts in place.
        prefixes: beginnings that are attended first, for some of those; they are not in `tables`.
    """

    tokens: np.ndarray
    positions: np.ndarray
    lines: np.ndarray
    blocks: np.ndarray
    slots: np.ndarray
    tables: list[BlockTable]
    num_attended: int
    are_alone: bool = False
    prefixes: Sequence[SharedPrefix] = ()


class DecodeKernel:
    """The kernel over one engine's blocks.

    Attributes:
        sizes: KV heads, tokens a block, numbers a head.
        block_bytes: from block to block.
        keys, values: addresses by layer.
        entry: what is run.
        prefixes: attends to prefixes first, or None.
    """

    def __init__(self, blocks: KVBlocks) -> None:
        self.prefixes = PrefixAttention.of(blocks)
        self.sizes = blocks.keys[0].shape[1:]  # H_kv, block_size, D
        self.block_bytes = blocks.keys[0].stride(0) * blocks.keys[0].element_size()
        self.keys = [layer.data_ptr() for layer in blocks.keys]
        self.values = [layer.data_ptr() for layer in blocks.values]
        # Held, so that the addresses above stay good.
        self._blocks = blocks
        self.entry = _entry(blocks.keys[0].dtype)

    @staticmethod
    def fits(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether the kernel serves this device, dtype and head size."""
        return (
            device.type == "cpu"
            and dtype in (torch.bfloat16, torch.float32)
            and head_dim % LANES == 0
        )

    def plan(self, rows: KernelRows) -> KernelPlan:
        """Bind one step's rows; what it returns is `AttentionPath.fast` for this step."""
        return KernelPlan(self, rows)


class KernelPlan:
    """One step's rows; each layer is set, then run.

    Attributes:
        prefixes: what is attended first, or None.
    """

    def __init__(self, kernel: DecodeKernel, rows: KernelRows) -> None:
        self._kernel = kernel
        counts = np.array([len(ids) for ids, _, _ in rows.tables], dtype=np.int64)
        padded = np.zeros((3, len(counts), int(counts.max(initial=0))), dtype=np.int64)
        for line, parts in enumerate(rows.tables):
            for side, part in enumerate(parts):
                padded[side, line, : counts[line]] = part
        by_row = np.stack((rows.tokens, rows.positions, rows.lines, rows.blocks, rows.slots))
        # What is done one after the other, and with how many of the rows.
        if rows.are_alone:
            self._passes = [(_BOTH, rows.num_attended)]
        else:  # rows of one sequence see each other's keys, which must all be there first
            self._passes = [(_PUT, len(rows.tokens)), (_ATTEND, rows.num_attended)]
        self.prefixes: PrefixPlan | None = None
        if rows.prefixes and kernel.prefixes is not None:
            self.prefixes = PrefixPlan(kernel.prefixes, rows.prefixes, rows.tokens)
        self._scales = np.zeros(2)
        self._no_slopes = np.zeros(_MOST_HEADS, np.float32)
        # Not numpy's: an item of it takes ten times as long to set, thirty of them in every layer.
        self._table = table = (ctypes.c_int64 * TABLE_SIZE)()
        self._at = ctypes.addressof(table)
        for field, part in zip(
            (_TOKENS, _POSITIONS, _LINES, _OWN_BLOCKS, _OWN_SLOTS), by_row, strict=True
        ):
            table[field] = part.ctypes.data
        table[_COUNTS] = counts.ctypes.data
        table[_BLOCKS], table[_FIRST], table[_FILLED] = (part.ctypes.data for part in padded)
        table[_MAX_BLOCKS] = padded.shape[2]
        table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM] = kernel.sizes
        table[_BLOCK_BYTES] = kernel.block_bytes
        table[_SCALES], table[_TABLE_AT] = self._scales.ctypes.data, self._at
        self._held = (by_row, counts, padded)

    @property
    def num_passes(self) -> int:
        """1 where every row is a single token that is attended here; else 2, of which the first puts
        keys and values in place."""
        return len(self._passes)

    def set_layer(
        self,
        layer: int,
        query: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        """Fill in what depends on the layer: see `adapters.attention_hook.Attention`.

        The tensors must outlast the `run`.
        """
        if alibi_slopes is None and query.shape[1] > _MOST_HEADS:
            raise ValueError(f"{query.shape[1]} query heads, expected at most {_MOST_HEADS}")
        self._tensors = [_with_dense_rows(x) for x in (query, new_keys, new_values)]
        query, new_keys, new_values = self._tensors
        table, kernel = self._table, self._kernel
        table[_QUERY], table[_OUT] = query.data_ptr(), out.data_ptr()
        table[_NEW_KEYS], table[_NEW_VALUES] = new_keys.data_ptr(), new_values.data_ptr()
        table[_TOKEN_STRIDE], table[_HEAD_STRIDE], _ = query.stride()
        table[_KEY_TOKEN_STRIDE], table[_KEY_HEAD_STRIDE], _ = new_keys.stride()
        table[_VALUE_TOKEN_STRIDE], table[_VALUE_HEAD_STRIDE], _ = new_values.stride()
        table[_KEYS], table[_VALUES] = kernel.keys[layer], kernel.values[layer]
        slopes = self._no_slopes.ctypes.data if alibi_slopes is None else alibi_slopes.data_ptr()
        table[_SLOPES], table[_HEADS], table[_WINDOW] = slopes, query.shape[1], window or 0
        table[_BENT] = softcap is not None or alibi_slopes is not None
        self._scales[:] = scale, softcap or 0.0
        if self.prefixes is not None:
            if window or table[_BENT]:
                raise ValueError("prefixes are attended apart where scores depend on no position")
            self.prefixes.set_layer(layer, query, scale)
            table[_PREFIXES] = self.prefixes.out_at
            table[_PREFIX_PLACES] = self.prefixes.places_at

    def run(self) -> None:
        """Compute the layer that was set."""
        if self.prefixes is not None:
            self.prefixes.run()
        table = self._table
        for table[_WORK], table[_ROWS] in self._passes:
            table[_NEXT_JOB] = 0
            self._kernel.entry.run(self._at, table[_ROWS])

    def write_layers(
        self,
        tables: np.ndarray,
        addresses: np.ndarray,
        layers: list[int],
        windows: list[int],
        number: int,
    ) -> None:
        """Tables (L, >= TABLE_SIZE) of pass `number` in several layers that are as the one that was set
        but for their keys, values and windows; each will lie at its address (L,)."""
        tables[:, :TABLE_SIZE] = np.ctypeslib.as_array(self._table)
        tables[:, _KEYS] = [self._kernel.keys[layer] for layer in layers]
        tables[:, _VALUES] = [self._kernel.values[layer] for layer in layers]
        tables[:, _WINDOW], tables[:, _TABLE_AT], tables[:, _NEXT_JOB] = windows, addresses, 0
        tables[:, _WORK], tables[:, _ROWS] = self._passes[number]


def _with_dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(T, H, D) as it is if D is dense, else a copy."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
