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
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from server.engine.decode_kernel import BlockTable
from server.engine.kv_cache import KVBlocks
from server.engine.openmp import Kernel
from server.engine.tiles import (
    COLUMNS,
    DEPTH,
    MOST_ROWS,
    TILE_BYTES,
    TILE_ROWS,
    has_tiles,
    product_of_16,
    product_of_32,
    release_tiles,
    shape_tiles,
    shapes_at,
)
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import (
    I16,
    I32,
    VECTOR,
    VECTOR_I32,
    Loop,
    array_at,
    constant,
    exp,
    fma,
    integer,
    load,
    max_lane,
    splat,
    store,
    sum_lanes,
    take_number,
)

# Above every position: a column that holds no key is hidden from every query.
NOWHERE = 2**31 - 1

# Fields of a job table, int64: addresses, sizes, bytes from one to the next.
(
    _NEXT_JOB, _TABLE_AT, _PIECES, _QUERY, _OUT, _KEYS, _VALUES, _TOKENS, _COUNTS, _POSITIONS, _BLOCKS,
    _NUM_BLOCKS, _KEY_POSITIONS, _SLOPES, _SCALES, _HEADS, _KV_HEADS, _HEAD_DIM, _MAX_BLOCKS, _MAX_PANELS,
    _BLOCK_SIZE, _BLOCK_BYTES, _TOKEN_BYTES, _HEAD_BYTES, _WINDOW, _SHAPES, _TABLE_SIZE,
) = range(27)  # fmt: skip

_ROW_BYTES = COLUMNS * 4
# From panel to panel: scores of MOST_ROWS queries, and a line more, so that one query's scores do not all
# fall into one set of the cache.
_SCORE_BYTES = (MOST_ROWS + 1) * _ROW_BYTES
# Keys that are packed at a time; a panel holds two of them.
_KEYS_AT_ONCE = COLUMNS // 2
_I16S = ir.VectorType(I16, 16)
# Query heads of a model at most, for those that have no slopes.
_MOST_HEADS = 1024


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers: what were rows are columns, by exchanging ever smaller squares."""
    width = 8
    while width:
        first = [lane if not lane & width else 16 + lane - width for lane in range(16)]
        second = [lane + width if not lane & width else 16 + lane for lane in range(16)]
        masks = [ir.Constant(ir.VectorType(I32, 16), lanes) for lanes in (first, second)]
        for low in (i for i in range(16) if not i & width):
            pair = rows[low], rows[low + width]
            rows[low], rows[low + width] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        width //= 2
    return rows


@intrinsic
def _pack_keys(typing_context: Any, keys: Any, row_bytes: Any, packed: Any) -> Any:
    """16 keys (rows of `row_bytes` each, dense) to one side of a panel, (D / 2, 32 keys, 2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys_at, num_bytes, packed_at = arguments
        loop = Loop(builder, num_bytes, TILE_BYTES, [])
        at = builder.add(keys_at, loop.index)
        rows = []
        for key in range(_KEYS_AT_ONCE):
            row_at = builder.add(at, builder.mul(num_bytes, integer(key)))
            rows.append(builder.load(_at(builder, row_at, VECTOR_I32), align=4))
        # 16 pairs of numbers a turn, each a row of the panel.
        to = builder.add(packed_at, builder.mul(loop.index, integer(_ROW_BYTES // 4)))
        for index, pairs in enumerate(_transposed(builder, rows)):
            pairs_at = builder.add(to, integer(index * _ROW_BYTES))
            builder.store(pairs, _at(builder, pairs_at, VECTOR_I32), align=4)
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _pack_values(typing_context: Any, values: Any, row_bytes: Any, packed: Any) -> Any:
    """16 values of 32 numbers, `row_bytes` apart, to 8 rows of a panel, (keys / 2, 32, 2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_at, num_bytes, packed_at = arguments
        for pair in range(_KEYS_AT_ONCE // 2):
            for half in range(2):
                parts = []
                for key in (2 * pair, 2 * pair + 1):
                    at = builder.add(values_at, builder.mul(num_bytes, integer(key)))
                    at = builder.add(at, integer(half * TILE_BYTES // 2))
                    raw = builder.load(_at(builder, at, _I16S), align=2)
                    parts.append(builder.zext(raw, VECTOR_I32))
                high = builder.shl(parts[1], ir.Constant(VECTOR_I32, [16] * 16))
                to = builder.add(packed_at, integer(pair * _ROW_BYTES + half * TILE_BYTES))
                both = builder.or_(parts[0], high)
                builder.store(both, _at(builder, to, VECTOR_I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _clear_rows(typing_context: Any, packed: Any) -> Any:
    """Zeros in 8 rows of a panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for part in range(_KEYS_AT_ONCE // 2 * _ROW_BYTES // TILE_BYTES):
            to = builder.add(arguments[0], integer(part * TILE_BYTES))
            store(builder, constant(0.0), to, types.float32)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _weigh(
    typing_context: Any, scores: Any, num_panels: Any, key_positions: Any, position: Any,
    window: Any, scale: Any, slope: Any, weights: Any,
) -> Any:  # fmt: skip
    """One query's scores to weights (bf16) that add up to what is returned.

    Scores are one row of 32 in each panel. Seen are keys at positions <= `position` and, with a
    `window` > 0, > `position` - `window`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores_at, panels, positions_at, position, window, scale, slope, weights_at = arguments
        no_window = builder.icmp_signed("==", window, integer(0))
        lowest = builder.sub(position, window)
        lowest = builder.select(no_window, integer(-1), lowest)
        ends = []
        for bound in (position, lowest):
            one = builder.insert_element(
                ir.Constant(VECTOR_I32, ir.Undefined),
                builder.trunc(bound, I32),
                ir.Constant(I32, 0),
            )
            ends.append(builder.shuffle_vector(one, one, ir.Constant(VECTOR_I32, [0] * 16)))
        scales, slopes = splat(builder, scale), splat(builder, slope)
        end = builder.mul(panels, integer(_ROW_BYTES))

        def places(loop: Loop, half: int) -> tuple[Any, Any]:
            """Addresses of the scores and of their keys' positions."""
            side = integer(half * TILE_BYTES)
            within = builder.mul(loop.index, integer(_SCORE_BYTES // _ROW_BYTES))
            at = builder.add(builder.add(scores_at, within), side)
            return at, builder.add(builder.add(positions_at, loop.index), side)

        loop = Loop(builder, end, _ROW_BYTES, [constant(float("-inf"))])
        best = loop.values[0]
        for half in range(2):
            at, keys_at = places(loop, half)
            keys = builder.load(_at(builder, keys_at, VECTOR_I32), align=4)
            away = builder.sitofp(builder.sub(keys, ends[0]), VECTOR)
            score = fma(builder, load(builder, at, types.float32), scales, constant(0.0))
            score = fma(builder, slopes, away, score)
            is_seen = builder.and_(
                builder.icmp_signed("<=", keys, ends[0]), builder.icmp_signed(">", keys, ends[1])
            )
            score = builder.select(is_seen, score, constant(float("-inf")))
            store(builder, score, at, types.float32)
            best = builder.select(builder.fcmp_ordered(">", score, best), score, best)
        loop.close([best])
        best = splat(builder, max_lane(builder, best))

        loop = Loop(builder, end, _ROW_BYTES, [constant(0.0)])
        total = loop.values[0]
        for half in range(2):
            at, _ = places(loop, half)
            weight = exp(builder, builder.fsub(load(builder, at, types.float32), best))
            total = builder.fadd(total, weight)
            to = builder.add(weights_at, builder.udiv(loop.index, integer(2)))
            to = builder.add(to, integer(half * TILE_BYTES // 2))
            store(builder, weight, to, types.uint16)
        loop.close([total])
        return sum_lanes(builder, total)

    integers = [types.int64] * 4
    floats = [types.float32] * 2
    return types.float32(types.int64, *integers, *floats, types.int64), generate


@intrinsic
def _round_row(typing_context: Any, sums: Any, factor: Any, out: Any) -> Any:
    """out = sums * factor as bf16, 32 of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_at, factor, out_at = arguments
        factors = splat(builder, factor)
        for half in range(2):
            at = builder.add(sums_at, integer(half * TILE_BYTES))
            each = builder.fmul(load(builder, at, types.float32), factors)
            to = builder.add(out_at, integer(half * TILE_BYTES // 2))
            store(builder, each, to, types.uint16)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), generate


@njit
def _pack(table: Any, piece: Any, kv_head: Any, keys_to: Any, values_to: Any) -> Any:
    """Pack what a piece sees, and say how many panels of 32 keys that is.

    Keys go to panels one after the other, values to panels of 32 columns, each for all keys.
    """
    size, row_bytes = table[_BLOCK_SIZE], table[_HEAD_DIM] * 2
    num_blocks = carray(array_at(table[_NUM_BLOCKS]), (table[_PIECES],), np.int64)[piece]
    blocks_at = table[_BLOCKS] + piece * table[_MAX_BLOCKS] * 8
    blocks = carray(array_at(blocks_at), (num_blocks,), np.int64)
    parts = size // _KEYS_AT_ONCE
    num_packed = num_blocks * parts
    panels = (num_packed + 1) // 2
    key_panel, value_panel = row_bytes * COLUMNS, panels * COLUMNS * COLUMNS * 2
    half_rows = _KEYS_AT_ONCE // 2 * _ROW_BYTES
    for number in range(num_packed):
        block, slot = blocks[number // parts], number % parts * _KEYS_AT_ONCE
        at = block * table[_BLOCK_BYTES] + (kv_head * size + slot) * row_bytes
        side = (number % 2) * TILE_BYTES
        _pack_keys(table[_KEYS] + at, row_bytes, keys_to + (number // 2) * key_panel + side)
        for column in range(row_bytes // TILE_BYTES):
            to = values_to + column * value_panel + number * half_rows
            _pack_values(table[_VALUES] + at + column * TILE_BYTES, row_bytes, to)
    if num_packed % 2:
        # No key is there: its weight is 0, and 0 * NaN would be NaN.
        for column in range(row_bytes // TILE_BYTES):
            _clear_rows(values_to + column * value_panel + num_packed * half_rows)
    return panels


@njit
def _cap(scores_at: Any, panels: Any, scale: Any, softcap: Any) -> None:
    """Scores of one query scaled and kept below `softcap`."""
    for panel in range(panels):
        scores = carray(array_at(scores_at + panel * _SCORE_BYTES), (COLUMNS,), np.float32)
        for index in range(COLUMNS):
            scores[index] = softcap * np.float32(math.tanh(scores[index] * scale / softcap))


@njit
def _product(rows: Any, x: Any, x_bytes: Any, packed: Any, packed_bytes: Any, sums: Any) -> None:
    if rows <= TILE_ROWS:
        product_of_16(x, x_bytes, packed, packed_bytes, sums)
    else:
        product_of_32(x, x_bytes, packed, packed_bytes, sums)


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
    key_positions = table[_KEY_POSITIONS] + piece * table[_MAX_PANELS] * _ROW_BYTES
    shape_tiles(table[_SHAPES] + (rows - 1) * TILE_BYTES)
    query = table[_QUERY] + token * table[_TOKEN_BYTES] + head * table[_HEAD_BYTES]
    key_panel = head_dim * COLUMNS * 2
    for panel in range(panels):
        to = scores + panel * _SCORE_BYTES
        _product(rows, query, table[_TOKEN_BYTES], keys + panel * key_panel, key_panel, to)
    # An odd number of lines from row to row: not all of them in one set of the cache.
    weight_bytes = (panels | 1) * TILE_BYTES
    for row in range(rows):
        mine = scores + row * _ROW_BYTES
        factor = scale
        if softcap != np.float32(0.0):
            _cap(mine, panels, scale, softcap)
            factor = np.float32(1.0)
        totals[row] = _weigh(
            mine, panels, key_positions, position + row, table[_WINDOW], factor, slope,
            weights + row * weight_bytes,
        )  # fmt: skip
    value_panel = panels * COLUMNS * COLUMNS * 2
    out = table[_OUT] + (token * table[_HEADS] + head) * head_dim * 2
    for column in range(head_dim // COLUMNS):
        _product(rows, weights, weight_bytes, values + column * value_panel, value_panel, sums)
        for row in range(rows):
            to = out + row * table[_HEADS] * head_dim * 2 + column * TILE_BYTES
            _round_row(sums + row * _ROW_BYTES, np.float32(1.0) / totals[row], to)


@njit
def _take_jobs(table: Any, memory: Any) -> None:
    """Take (piece, KV head) jobs until none is left; any number of threads may do so at once."""
    kv_heads, group = table[_KV_HEADS], table[_HEADS] // table[_KV_HEADS]
    packed_bytes, score_bytes, weight_bytes = _sizes(table)
    keys = (memory.ctypes.data + TILE_BYTES - 1) // TILE_BYTES * TILE_BYTES
    values = keys + packed_bytes
    scores = values + packed_bytes
    weights = scores + score_bytes
    work = (keys, values, scores, weights, weights + weight_bytes)
    totals = np.empty(MOST_ROWS, np.float32)
    counts = carray(array_at(table[_COUNTS]), (table[_PIECES],), np.int64)
    job = take_number(table[_TABLE_AT])
    while job < table[_PIECES] * kv_heads:
        piece, kv_head = job // kv_heads, job % kv_heads
        panels = _pack(table, piece, kv_head, keys, values)
        for head in range(kv_head * group, (kv_head + 1) * group):
            for first in range(0, counts[piece], MOST_ROWS):
                rows = min(MOST_ROWS, counts[piece] - first)
                _attend(table, piece, head, first, rows, panels, work, totals)
        job = take_number(table[_TABLE_AT])
    release_tiles()


@njit
def _sizes(table: Any) -> Any:
    """Bytes of packed keys or values, of scores, and of weights, for the longest piece."""
    most = table[_MAX_PANELS]
    packed_bytes = most * COLUMNS * table[_HEAD_DIM] * 2
    return packed_bytes, most * _SCORE_BYTES, MOST_ROWS * (most | 1) * TILE_BYTES


@njit
def _run(table: Any) -> None:
    packed_bytes, score_bytes, weight_bytes = _sizes(table)
    size = 2 * packed_bytes + score_bytes + weight_bytes + _SCORE_BYTES + TILE_BYTES
    # Held here: numba frees an array after its last use by name, and only its address is used below.
    memory = np.empty(size, np.uint8)
    _take_jobs(table, memory)


@cache
def _entry(version: int = VERSION) -> Kernel:
    """What is called, compiled when first asked for; `version` see `vector_loops`."""

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
        if size % _KEYS_AT_ONCE or head_dim % DEPTH:
            return None
        return TileAttention(blocks)

    def plan(self, pieces: list[TilePiece]) -> TilePlan:
        """Bind one step's pieces."""
        return TilePlan(self, pieces)


class TilePlan:
    """One step's pieces; each layer is set and run."""

    def __init__(self, kernel: TileAttention, pieces: list[TilePiece]) -> None:
        self._kernel = kernel
        size = kernel.sizes[1]
        numbers = np.array(
            [(piece.at, piece.num_tokens, piece.position, len(piece.table[0])) for piece in pieces],
            dtype=np.int64,
        ).T.copy()
        most = int(numbers[3].max())
        panels = -(-most * size // COLUMNS)
        blocks = np.zeros((len(pieces), most), np.int64)
        key_positions = np.full((len(pieces), panels * COLUMNS), NOWHERE, np.int32)
        slots = np.arange(size)
        for line, piece in enumerate(pieces):
            ids, first, filled = (part[:, None] for part in piece.table)
            blocks[line, : len(ids)] = piece.table[0]
            there = np.where(slots < filled, first + slots, NOWHERE)
            key_positions[line, : there.size] = there.reshape(-1)
        self._scales = np.zeros(2, np.float32)
        self._no_slopes = np.zeros(_MOST_HEADS, np.float32)
        self._table = table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = table[_TABLE_AT] = ctypes.addressof(table)
        fields = (_TOKENS, _COUNTS, _POSITIONS, _NUM_BLOCKS)
        for field, part in zip(fields, numbers, strict=True):
            table[field] = part.ctypes.data
        table[_PIECES], table[_MAX_BLOCKS], table[_MAX_PANELS] = len(pieces), most, panels
        table[_BLOCKS], table[_KEY_POSITIONS] = blocks.ctypes.data, key_positions.ctypes.data
        table[_KV_HEADS], table[_BLOCK_SIZE], table[_HEAD_DIM] = kernel.sizes
        table[_BLOCK_BYTES], table[_SCALES] = kernel.block_bytes, self._scales.ctypes.data
        table[_SHAPES] = shapes_at(1)
        self._held = (numbers, blocks, key_positions)

    def run(
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
        """Attend from the pieces' tokens; their keys and values must be in place.

        Args:
            layer: its number.
            query: (T, H, D) of the packed row.
            out: (T, H, D), dense; the rows of the pieces are written.
            scale, window, softcap, alibi_slopes: see `adapters.attention_hook.Attention`.
        """
        if alibi_slopes is None and query.shape[1] > _MOST_HEADS:
            raise ValueError(f"{query.shape[1]} query heads, expected at most {_MOST_HEADS}")
        if query.stride(2) != 1:
            query = query.contiguous()
        table = self._table
        table[_NEXT_JOB], table[_QUERY], table[_OUT] = 0, query.data_ptr(), out.data_ptr()
        table[_TOKEN_BYTES], table[_HEAD_BYTES] = (2 * n for n in query.stride()[:2])
        table[_KEYS], table[_VALUES] = self._kernel.keys[layer], self._kernel.values[layer]
        slopes = self._no_slopes.ctypes.data if alibi_slopes is None else alibi_slopes.data_ptr()
        table[_SLOPES], table[_HEADS], table[_WINDOW] = slopes, query.shape[1], window or 0
        self._scales[:] = scale, softcap or 0.0
        self._kernel.entry.run(self._at, table[_PIECES] * table[_KV_HEADS])
