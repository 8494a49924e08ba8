"""Attention of single tokens over the prefixes of their adapters, on the processor's matrix tiles (AMX).

Sequences of one adapter see the same keys first. Those of a KV head are packed once for all of them, and
the queries of all go through the products together; `decode_kernel` then counts what comes out as one key
more. What a row gets is the same in any batch: a row alone is taken the same way.

32 rows over 1,024 shared keys took 28 ms a step in the decode kernel, which reads them once a row.

Knows KV blocks and groups of rows; not sequences, adapters or the model.
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
from server.engine.tile_attention import NOWHERE, TileAttention
from server.engine.tile_loops import (
    ROW_BYTES,
    SCORE_BYTES,
    pack,
    parts_of,
    product,
    value_panel_bytes,
    weigh,
    weight_bytes,
    work_bytes,
)
from server.engine.tiles import (
    COLUMNS,
    MOST_ROWS,
    TILE_BYTES,
    TILE_ROWS,
    release_tiles,
    shape_tiles,
    shapes_at,
)
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import LANES, array_at, take_number

# Fields of a job table, int64: addresses, sizes, bytes from one to the next.
(
    _NEXT_JOB, _TABLE_AT, _GROUPS, _QUERY, _OUT, _KEYS, _VALUES, _TOKENS, _STARTS, _BLOCKS, _NUM_BLOCKS,
    _KEY_POSITIONS, _SCALE, _HEADS, _KV_HEADS, _HEAD_DIM, _MAX_BLOCKS, _MAX_PANELS, _BLOCK_SIZE,
    _BLOCK_BYTES, _TOKEN_BYTES, _HEAD_BYTES, _SHAPES, _TABLE_SIZE,
) = range(24)  # fmt: skip

# A KV head's queries of one group are shared by so many jobs, where they fill more tiles than one job takes
# at once: three KV heads alone would leave one of two threads without work for a third of the time.
_PARTS = 2


@njit
def _gather(table: Any, first: Any, rows: Any, kv_head: Any, start: Any, to: Any) -> None:
    """Queries of a group and KV head side by side: number `first` of the group on, `rows` of them."""
    words = table[_HEAD_DIM] // 4
    heads = table[_HEADS] // table[_KV_HEADS]
    for index in range(rows):
        row, head = start + (first + index) // heads, kv_head * heads + (first + index) % heads
        token = carray(array_at(table[_TOKENS] + row * 8), (1,), np.int64)[0]
        at = table[_QUERY] + token * table[_TOKEN_BYTES] + head * table[_HEAD_BYTES]
        query = carray(array_at(at), (words,), np.int64)
        copied = carray(array_at(to + index * words * 8), (words,), np.int64)
        for d in range(words):
            copied[d] = query[d]


@njit
def _attend(
    table: Any, group: Any, kv_head: Any, start: Any, first: Any, rows: Any, panels: Any, work: Any,
    totals: Any,
) -> None:  # fmt: skip
    """`rows` queries of a group and KV head, from number `first` on; `start` is the group's first row.

    `totals` are the sums of weights and the largest scores, (2, MOST_ROWS).
    """
    keys, values, scores, weights, sums, queries = work
    head_dim, heads = table[_HEAD_DIM], table[_HEADS] // table[_KV_HEADS]
    _gather(table, first, rows, kv_head, start, queries)
    shape_tiles(table[_SHAPES] + (rows - 1) * TILE_BYTES)
    key_panel, row_bytes = head_dim * COLUMNS * 2, weight_bytes(panels)
    for panel in range(panels):
        to = scores + panel * SCORE_BYTES
        product(rows, queries, head_dim * 2, keys + panel * key_panel, key_panel, to)
    scale = np.float32(carray(array_at(table[_SCALE]), (1,), np.float64)[0])
    positions = table[_KEY_POSITIONS] + group * table[_MAX_PANELS] * ROW_BYTES
    for row in range(rows):
        # Every query comes after all of these keys.
        totals[0, row], totals[1, row] = weigh(
            scores + row * ROW_BYTES, panels, positions, NOWHERE - 1, 0, scale, np.float32(0.0),
            weights + row * row_bytes,
        )  # fmt: skip
    for column in range(head_dim // COLUMNS):
        packed = values + column * value_panel_bytes(panels)
        product(rows, weights, row_bytes, packed, value_panel_bytes(panels), sums)
        for row in range(rows):
            number = first + row
            place = (start + number // heads) * table[_HEADS] + kv_head * heads + number % heads
            at = table[_OUT] + place * (head_dim + LANES) * 4
            out = carray(array_at(at), (head_dim + LANES,), np.float32)
            found = carray(array_at(sums + row * ROW_BYTES), (COLUMNS,), np.float32)
            for d in range(COLUMNS):
                out[column * COLUMNS + d] = found[d] / totals[0, row]
            out[head_dim] = totals[1, row] + np.float32(math.log(totals[0, row]))


@njit
def _take_jobs(table: Any, memory: Any, gathered: Any) -> None:
    """Take (group, KV head, part) jobs until none is left; any number of threads may do so at once."""
    kv_heads, heads = table[_KV_HEADS], table[_HEADS] // table[_KV_HEADS]
    work = parts_of(memory, table[_MAX_PANELS], table[_HEAD_DIM])
    layer = (
        table[_KEYS],
        table[_VALUES],
        table[_BLOCK_BYTES],
        table[_BLOCK_SIZE],
        table[_HEAD_DIM],
    )
    starts = carray(array_at(table[_STARTS]), (table[_GROUPS] + 1,), np.int64)
    num_blocks = carray(array_at(table[_NUM_BLOCKS]), (table[_GROUPS],), np.int64)
    totals = np.empty((2, MOST_ROWS), np.float32)
    job = take_number(table[_TABLE_AT])
    while job < table[_GROUPS] * kv_heads * _PARTS:
        group, kv_head, part = job // (kv_heads * _PARTS), job // _PARTS % kv_heads, job % _PARTS
        count = (starts[group + 1] - starts[group]) * heads
        size = count
        if count > MOST_ROWS:
            size = (count + _PARTS * TILE_ROWS - 1) // (_PARTS * TILE_ROWS) * TILE_ROWS
        begin, end = min(part * size, count), min((part + 1) * size, count)
        if begin < end:
            blocks_at = table[_BLOCKS] + group * table[_MAX_BLOCKS] * 8
            blocks = carray(array_at(blocks_at), (num_blocks[group],), np.int64)
            panels = pack(layer, blocks, kv_head, work[0], work[1])
            for first in range(begin, end, MOST_ROWS):
                rows = min(MOST_ROWS, end - first)
                places = (*work, gathered.ctypes.data)
                _attend(table, group, kv_head, starts[group], first, rows, panels, places, totals)
        job = take_number(table[_TABLE_AT])
    release_tiles()


@njit
def _run(table: Any) -> None:
    if table[_GROUPS] == 0:
        return
    # Held here: numba frees an array after its last use by name, and only its address is used below.
    memory = np.empty(work_bytes(table[_MAX_PANELS], table[_HEAD_DIM]), np.uint8)
    gathered = np.empty(MOST_ROWS * table[_HEAD_DIM], np.uint16)
    _take_jobs(table, memory, gathered)


@cache
def _entry(version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _run(carray(table_at, (_TABLE_SIZE,), np.int64))

    return Kernel(run)


@dataclass(frozen=True)
class SharedPrefix:
    """Keys that some rows of a step see before all others.

    Attributes:
        rows: (R,) int64, which rows; no row has two prefixes.
        table: the blocks, all of whose keys are seen.
    """

    rows: np.ndarray
    table: BlockTable


class PrefixAttention:
    """The kernel over one engine's blocks.

    Args:
        tiles: that of prompts, over the same blocks.

    Attributes:
        entry: what is run.
    """

    def __init__(self, tiles: TileAttention) -> None:
        self.tiles = tiles
        self.entry = _entry()

    @staticmethod
    def of(blocks: KVBlocks) -> PrefixAttention | None:
        """The kernel, compiled, or None where `TileAttention` has none."""
        tiles = TileAttention.of(blocks)
        return None if tiles is None else PrefixAttention(tiles)


class PrefixPlan:
    """The prefixes of one step; each layer is set, then run.

    Args:
        kernel: over the blocks.
        prefixes: at least one.
        tokens: (R,) int64, the index in the packed row of each row.
    """

    def __init__(
        self, kernel: PrefixAttention, prefixes: Sequence[SharedPrefix], tokens: np.ndarray
    ) -> None:
        self._kernel = kernel
        rows = np.concatenate([prefix.rows for prefix in prefixes])
        self._places = np.full(len(tokens), -1, np.int64)
        self._places[rows] = np.arange(len(rows))
        tiles = kernel.tiles
        blocks, key_positions = tiles.padded([prefix.table for prefix in prefixes])
        num_blocks = np.array([len(prefix.table[0]) for prefix in prefixes], np.int64)
        starts = np.cumsum([0] + [len(prefix.rows) for prefix in prefixes], dtype=np.int64)
        taken = tokens[rows]
        self._out: np.ndarray = np.empty(0, np.float32)
        self._scale = np.zeros(1)
        self._table = table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = table[_TABLE_AT] = ctypes.addressof(table)
        self._held = (blocks, key_positions, num_blocks, starts, taken)
        fields = (_BLOCKS, _KEY_POSITIONS, _NUM_BLOCKS, _STARTS, _TOKENS)
        for field, part in zip(fields, self._held, strict=True):
            table[field] = part.ctypes.data
        table[_GROUPS], table[_MAX_BLOCKS] = len(prefixes), blocks.shape[1]
        table[_MAX_PANELS] = key_positions.shape[1] // COLUMNS
        table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM] = tiles.sizes
        table[_BLOCK_BYTES], table[_SCALE] = tiles.block_bytes, self._scale.ctypes.data
        table[_SHAPES] = shapes_at(1)
        self._num_rows = len(rows)

    @property
    def places_at(self) -> int:
        """Address of (R,) int64: where a row's numbers stand in what is found, or -1."""
        return int(self._places.ctypes.data)

    @property
    def out_at(self) -> int:
        """Address of what is found, (places, H, D + LANES) float32: for each head the mean of the values by
        their weights, then the logarithm of what all keys weigh together."""
        return int(self._out.ctypes.data)

    def set_layer(self, layer: int, query: torch.Tensor, scale: float) -> None:
        """Fill in what depends on the layer: its number, query (T, H, D) with dense heads, and scale."""
        table, tiles = self._table, self._kernel.tiles
        shape = (self._num_rows, query.shape[1], query.shape[2] + LANES)
        if self._out.shape != shape:
            self._out = np.empty(shape, np.float32)
        table[_QUERY], table[_OUT], table[_HEADS] = query.data_ptr(), self.out_at, query.shape[1]
        table[_TOKEN_BYTES], table[_HEAD_BYTES] = (2 * n for n in query.stride()[:2])
        table[_KEYS], table[_VALUES] = tiles.keys[layer], tiles.values[layer]
        self._scale[:] = scale

    def run(self) -> None:
        """Compute the layer that was set."""
        table = self._table
        table[_NEXT_JOB] = 0
        self._kernel.entry.run(self._at, table[_GROUPS] * table[_KV_HEADS] * _PARTS)

    def write_layers(self, tables: np.ndarray, addresses: np.ndarray, layers: list[int]) -> None:
        """See `decode_kernel.KernelPlan.write_layers`."""
        tiles = self._kernel.tiles
        tables[:, :_TABLE_SIZE] = np.ctypeslib.as_array(self._table)
        tables[:, _KEYS] = [tiles.keys[layer] for layer in layers]
        tables[:, _VALUES] = [tiles.values[layer] for layer in layers]
        tables[:, _TABLE_AT], tables[:, _NEXT_JOB] = addresses, 0
