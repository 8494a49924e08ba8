"""Attention of prompts on the processor's matrix tiles (AMX), straight over the KV blocks.

A job is a piece of one sequence and one KV head. Its keys and values are packed for the tiles once; then,
for each query head, scores = q k, softmax and sums = weights v are taken for 32 queries together. Scores
and sums are float32; weights are rounded to bf16 before the second product, as in torch's own attention.
A query's numbers depend on its own sequence and on nothing beside it.

Ten prompts of 48 tokens took 32 ms in the decode kernel, which takes one token at a time, and take 6 here;
32 tokens before which 1,968 stand took 16 ms by gathered blocks and torch's attention, and take 8 here.

Knows KV blocks and the planned pieces; not sequences, adapters or the model.
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
from server.engine.tile_loops import (
    KEYS_AT_ONCE,
    ROW_BYTES,
    SCORE_BYTES,
    pack,
    parts_of,
    product,
    round_row,
    value_panel_bytes,
    weigh,
    weight_bytes,
    work_bytes,
)
from server.engine.tiles import (
    COLUMNS,
    DEPTH,
    MOST_ROWS,
    TILE_BYTES,
    has_tiles,
    release_tiles,
    shape_tiles,
    shapes_at,
)
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import array_at, take_number

# Above every position: a column that holds no key is hidden from every query.
NOWHERE = 2**31 - 1

# Fields of a job table, int64: addresses, sizes, bytes from one to the next.
(
    _NEXT_JOB, _TABLE_AT, _PIECES, _QUERY, _OUT, _KEYS, _VALUES, _TOKENS, _COUNTS, _POSITIONS, _BLOCKS,
    _NUM_BLOCKS, _KEY_POSITIONS, _SLOPES, _SCALES, _HEADS, _KV_HEADS, _HEAD_DIM, _MAX_BLOCKS, _MAX_PANELS,
    _BLOCK_SIZE, _BLOCK_BYTES, _TOKEN_BYTES, _HEAD_BYTES, _WINDOW, _SHAPES, _TABLE_SIZE,
) = range(27)  # fmt: skip

# Query heads of a model at most, for those that have no slopes.
_MOST_HEADS = 1024


@njit
def _cap(scores_at: Any, panels: Any, scale: Any, softcap: Any) -> None:
    """Scores of one query scaled and kept below `softcap`."""
    for panel in range(panels):
        scores = carray(array_at(scores_at + panel * SCORE_BYTES), (COLUMNS,), np.float32)
        for index in range(COLUMNS):
            scores[index] = softcap * np.float32(math.tanh(scores[index] * scale / softcap))


@njit
def _attend(
    table: Any, piece: Any, head: Any, first: Any, rows: Any, panels: Any, work: Any, totals: Any
) -> None:
    """`rows` queries of one head, from the piece's query `first` on."""
    keys, values, scores, weights, sums = work
    head_dim = table[_HEAD_DIM]
    token = carray(array_at(table[_TOKENS]), (table[_PIECES],), np.int64)[piece] + first
    position = carray(array_at(table[_POSITIONS]), (table[_PIECES],), np.int64)[piece] + first
    slope = carray(array_at(table[_SLOPES]), (table[_HEADS],), np.float32)[head]
    given = carray(array_at(table[_SCALES]), (2,), np.float32)
    scale, softcap = given[0], given[1]
    key_positions = table[_KEY_POSITIONS] + piece * table[_MAX_PANELS] * ROW_BYTES
    shape_tiles(table[_SHAPES] + (rows - 1) * TILE_BYTES)
    query = table[_QUERY] + token * table[_TOKEN_BYTES] + head * table[_HEAD_BYTES]
    key_panel = head_dim * COLUMNS * 2
    for panel in range(panels):
        to = scores + panel * SCORE_BYTES
        product(rows, query, table[_TOKEN_BYTES], keys + panel * key_panel, key_panel, to)
    row_bytes = weight_bytes(panels)
    for row in range(rows):
        mine = scores + row * ROW_BYTES
        factor = scale
        if softcap != np.float32(0.0):
            _cap(mine, panels, scale, softcap)
            factor = np.float32(1.0)
        totals[row], _ = weigh(
            mine, panels, key_positions, position + row, table[_WINDOW], factor, slope,
            weights + row * row_bytes,
        )  # fmt: skip
    value_panel = value_panel_bytes(panels)
    out = table[_OUT] + (token * table[_HEADS] + head) * head_dim * 2
    for column in range(head_dim // COLUMNS):
        product(rows, weights, row_bytes, values + column * value_panel, value_panel, sums)
        for row in range(rows):
            to = out + row * table[_HEADS] * head_dim * 2 + column * TILE_BYTES
            round_row(sums + row * ROW_BYTES, np.float32(1.0) / totals[row], to)


@njit
def _take_jobs(table: Any, memory: Any) -> None:
    """Take (piece, KV head) jobs until none is left; any number of threads may do so at once."""
    kv_heads, group = table[_KV_HEADS], table[_HEADS] // table[_KV_HEADS]
    work = parts_of(memory, table[_MAX_PANELS], table[_HEAD_DIM])
    layer = (
        table[_KEYS],
        table[_VALUES],
        table[_BLOCK_BYTES],
        table[_BLOCK_SIZE],
        table[_HEAD_DIM],
    )
    num_blocks = carray(array_at(table[_NUM_BLOCKS]), (table[_PIECES],), np.int64)
    totals = np.empty(MOST_ROWS, np.float32)
    counts = carray(array_at(table[_COUNTS]), (table[_PIECES],), np.int64)
    job = take_number(table[_TABLE_AT])
    while job < table[_PIECES] * kv_heads:
        piece, kv_head = job // kv_heads, job % kv_heads
        blocks_at = table[_BLOCKS] + piece * table[_MAX_BLOCKS] * 8
        blocks = carray(array_at(blocks_at), (num_blocks[piece],), np.int64)
        panels = pack(layer, blocks, kv_head, work[0], work[1])
        for head in range(kv_head * group, (kv_head + 1) * group):
            for first in range(0, counts[piece], MOST_ROWS):
                rows = min(MOST_ROWS, counts[piece] - first)
                _attend(table, piece, head, first, rows, panels, work, totals)
        job = take_number(table[_TABLE_AT])
    release_tiles()


@njit
def _run(table: Any) -> None:
    # Held here: numba frees an array after its last use by name, and only its address is used below.
    memory = np.empty(work_bytes(table[_MAX_PANELS], table[_HEAD_DIM]), np.uint8)
    _take_jobs(table, memory)


@cache
def _entry(version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _run(carray(table_at, (_TABLE_SIZE,), np.int64))

    return Kernel(run)


@dataclass(frozen=True)
class TilePiece:
    """Tokens of one sequence that follow each other.

    Attributes:
        at: index of the first of them in the packed row.
        num_tokens: how many.
        position: absolute position of the first.
        table: what the last of them sees; each sees the keys up to its own position.
    """

    at: int
    num_tokens: int
    position: int
    table: BlockTable


class TileAttention:
    """The kernel over one engine's blocks; `of` makes it.

    Attributes:
        sizes: KV heads, tokens a block, numbers a head.
        block_bytes: from block to block.
        keys, values: addresses by layer.
        entry: what is run.
    """

    def __init__(self, blocks: KVBlocks) -> None:
        self.sizes = blocks.keys[0].shape[1:]  # H_kv, block_size, D
        self.block_bytes = blocks.keys[0].stride(0) * blocks.keys[0].element_size()
        self.keys = [layer.data_ptr() for layer in blocks.keys]
        self.values = [layer.data_ptr() for layer in blocks.values]
        # Held, so that the addresses above stay good.
        self._blocks = blocks
        self.entry = _entry()

    @staticmethod
    def of(blocks: KVBlocks) -> TileAttention | None:
        """The kernel, compiled, or None where the processor, the dtype or the sizes are others."""
        keys = blocks.keys[0]
        _, _, size, head_dim = keys.shape
        if keys.device.type != "cpu" or keys.dtype != torch.bfloat16 or not has_tiles():
            return None
        if size % KEYS_AT_ONCE or head_dim % DEPTH:
            return None
        return TileAttention(blocks)

    def padded(self, tables: Sequence[BlockTable]) -> tuple[np.ndarray, np.ndarray]:
        """Block ids (N, most blocks) int64, and the position of the key in each column of their panels,
        (N, columns) int32."""
        size = self.sizes[1]
        most = max(len(ids) for ids, _, _ in tables)
        blocks = np.zeros((len(tables), most), np.int64)
        positions = np.full((len(tables), -(-most * size // COLUMNS) * COLUMNS), NOWHERE, np.int32)
        slots = np.arange(size)
        for line, (ids, first, filled) in enumerate(tables):
            blocks[line, : len(ids)] = ids
            there = np.where(slots < filled[:, None], first[:, None] + slots, NOWHERE)
            positions[line, : there.size] = there.reshape(-1)
        return blocks, positions

    def plan(self, pieces: list[TilePiece]) -> TilePlan:
        """Bind one step's pieces."""
        return TilePlan(self, pieces)


class TilePlan:
    """One step's pieces; each layer is set, then run."""

    def __init__(self, kernel: TileAttention, pieces: list[TilePiece]) -> None:
        self._kernel = kernel
        numbers = np.array(
            [(piece.at, piece.num_tokens, piece.position, len(piece.table[0])) for piece in pieces],
            dtype=np.int64,
        ).T.copy()
        blocks, key_positions = kernel.padded([piece.table for piece in pieces])
        self._scales = np.zeros(2, np.float32)
        self._no_slopes = np.zeros(_MOST_HEADS, np.float32)
        self._table = table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = table[_TABLE_AT] = ctypes.addressof(table)
        fields = (_TOKENS, _COUNTS, _POSITIONS, _NUM_BLOCKS)
        for field, part in zip(fields, numbers, strict=True):
            table[field] = part.ctypes.data
        table[_PIECES], table[_MAX_BLOCKS] = len(pieces), blocks.shape[1]
        table[_MAX_PANELS] = key_positions.shape[1] // COLUMNS
        table[_BLOCKS], table[_KEY_POSITIONS] = blocks.ctypes.data, key_positions.ctypes.data
        table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM] = kernel.sizes
        table[_BLOCK_BYTES], table[_SCALES] = kernel.block_bytes, self._scales.ctypes.data
        table[_SHAPES] = shapes_at(1)
        self._held = (numbers, blocks, key_positions)

    def set_layer(
        self,
        layer: int,
        query: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        """Fill in what depends on the layer. The tensors must outlast the `run`.

        Args:
            layer: its number.
            query: (T, H, D) of the packed row.
            out: (T, H, D), dense; the rows of the pieces are written.
            scale, window, softcap, alibi_slopes: see `adapters.attention_hook.Attention`.
        """
        if alibi_slopes is None and query.shape[1] > _MOST_HEADS:
            raise ValueError(f"{query.shape[1]} query heads, expected at most {_MOST_HEADS}")
        self._query = query = query if query.stride(2) == 1 else query.contiguous()
        table = self._table
        table[_QUERY], table[_OUT] = query.data_ptr(), out.data_ptr()
        table[_TOKEN_BYTES], table[_HEAD_BYTES] = (2 * n for n in query.stride()[:2])
        table[_KEYS], table[_VALUES] = self._kernel.keys[layer], self._kernel.values[layer]
        slopes = self._no_slopes.ctypes.data if alibi_slopes is None else alibi_slopes.data_ptr()
        table[_SLOPES], table[_HEADS], table[_WINDOW] = slopes, query.shape[1], window or 0
        self._scales[:] = scale, softcap or 0.0

    def run(self) -> None:
        """Attend from the pieces' tokens in the layer that was set; keys and values must be in place."""
        table = self._table
        table[_NEXT_JOB] = 0
        self._kernel.entry.run(self._at, table[_PIECES] * table[_KV_HEADS])

    def write_layers(
        self, tables: np.ndarray, addresses: np.ndarray, layers: list[int], windows: list[int]
    ) -> None:
        """See `decode_kernel.KernelPlan.write_layers`."""
        tables[:, :_TABLE_SIZE] = np.ctypeslib.as_array(self._table)
        tables[:, _KEYS] = [self._kernel.keys[layer] for layer in layers]
        tables[:, _VALUES] = [self._kernel.values[layer] for layer in layers]
        tables[:, _WINDOW], tables[:, _TABLE_AT], tables[:, _NEXT_JOB] = windows, addresses, 0
