"""What attention on tiles is made of: packing keys and values, scores to weights, rounding.

Panels are as in `tiles`. Vectors hold 16 numbers here: whoever has tiles has them. Knows addresses only.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from server.engine.tiles import (
    COLUMNS,
    MOST_ROWS,
    TILE_BYTES,
    TILE_ROWS,
    product_of_16,
    product_of_32,
)
from server.engine.vector_ops import (
    I16,
    I32,
    VECTOR,
    VECTOR_I32,
    Loop,
    constant,
    exp,
    fma,
    integer,
    load,
    max_lane,
    rounded,
    splat,
    store,
    sum_lanes,
)

ROW_BYTES = COLUMNS * 4
# From panel to panel: scores of MOST_ROWS queries, and a line more, so that one query's scores do not all
# fall into one set of the cache.
SCORE_BYTES = (MOST_ROWS + 1) * ROW_BYTES
# Keys that are packed at a time; a panel holds two of them.
KEYS_AT_ONCE = COLUMNS // 2
_I16S = ir.VectorType(I16, 16)


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
def pack_keys(typing_context: Any, keys: Any, row_bytes: Any, packed: Any) -> Any:
    """16 keys (rows of `row_bytes` each, dense) to one side of a panel, (D / 2, 32 keys, 2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys_at, num_bytes, packed_at = arguments
        loop = Loop(builder, num_bytes, TILE_BYTES, [])
        at = builder.add(keys_at, loop.index)
        rows = []
        for key in range(KEYS_AT_ONCE):
            row_at = builder.add(at, builder.mul(num_bytes, integer(key)))
            rows.append(builder.load(_at(builder, row_at, VECTOR_I32), align=4))
        # 16 pairs of numbers a turn, each a row of the panel.
        to = builder.add(packed_at, builder.mul(loop.index, integer(ROW_BYTES // 4)))
        for index, pairs in enumerate(_transposed(builder, rows)):
            pairs_at = builder.add(to, integer(index * ROW_BYTES))
            builder.store(pairs, _at(builder, pairs_at, VECTOR_I32), align=4)
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def pack_values(typing_context: Any, values: Any, row_bytes: Any, packed: Any) -> Any:
    """16 values of 32 numbers, `row_bytes` apart, to 8 rows of a panel, (keys / 2, 32, 2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_at, num_bytes, packed_at = arguments
        for pair in range(KEYS_AT_ONCE // 2):
            for half in range(2):
                parts = []
                for key in (2 * pair, 2 * pair + 1):
                    at = builder.add(values_at, builder.mul(num_bytes, integer(key)))
                    at = builder.add(at, integer(half * TILE_BYTES // 2))
                    raw = builder.load(_at(builder, at, _I16S), align=2)
                    parts.append(builder.zext(raw, VECTOR_I32))
                high = builder.shl(parts[1], ir.Constant(VECTOR_I32, [16] * 16))
                to = builder.add(packed_at, integer(pair * ROW_BYTES + half * TILE_BYTES))
                both = builder.or_(parts[0], high)
                builder.store(both, _at(builder, to, VECTOR_I32), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def clear_rows(typing_context: Any, packed: Any) -> Any:
    """Zeros in 8 rows of a panel."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for part in range(KEYS_AT_ONCE // 2 * ROW_BYTES // TILE_BYTES):
            to = builder.add(arguments[0], integer(part * TILE_BYTES))
            store(builder, constant(0.0), to, types.float32)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def weigh(
    typing_context: Any, scores: Any, num_panels: Any, key_positions: Any, position: Any,
    window: Any, scale: Any, slope: Any, weights: Any,
) -> Any:  # fmt: skip
    """One query's scores to weights (bf16), the largest 1; their sum, and the largest score.

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
        end = builder.mul(panels, integer(ROW_BYTES))

        def places(loop: Loop, half: int) -> tuple[Any, Any]:
            """Addresses of the scores and of their keys' positions."""
            side = integer(half * TILE_BYTES)
            within = builder.mul(loop.index, integer(SCORE_BYTES // ROW_BYTES))
            at = builder.add(builder.add(scores_at, within), side)
            return at, builder.add(builder.add(positions_at, loop.index), side)

        loop = Loop(builder, end, ROW_BYTES, [constant(float("-inf"))])
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

        loop = Loop(builder, end, ROW_BYTES, [constant(0.0)])
        total = loop.values[0]
        for half in range(2):
            at, _ = places(loop, half)
            weight = exp(builder, builder.fsub(load(builder, at, types.float32), best))
            # What is summed is what the values are multiplied by.
            weight = rounded(builder, weight, types.uint16)
            total = builder.fadd(total, weight)
            to = builder.add(weights_at, builder.udiv(loop.index, integer(2)))
            to = builder.add(to, integer(half * TILE_BYTES // 2))
            store(builder, weight, to, types.uint16)
        loop.close([total])
        both = sum_lanes(builder, total), builder.extract_element(best, ir.Constant(I32, 0))
        return context.make_tuple(builder, signature.return_type, both)

    integers = [types.int64] * 4
    floats = [types.float32] * 2
    two = types.UniTuple(types.float32, 2)
    return two(types.int64, *integers, *floats, types.int64), generate


@intrinsic
def round_row(typing_context: Any, sums: Any, factor: Any, out: Any) -> Any:
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
def product(rows: Any, x: Any, x_bytes: Any, packed: Any, packed_bytes: Any, sums: Any) -> None:
    """Sums of up to MOST_ROWS rows and one panel: see `tiles.product_of_16`. Tiles have their shapes."""
    if rows <= TILE_ROWS:
        product_of_16(x, x_bytes, packed, packed_bytes, sums)
    else:
        product_of_32(x, x_bytes, packed, packed_bytes, sums)


@njit
def pack(layer: Any, blocks: Any, kv_head: Any, keys_to: Any, values_to: Any) -> Any:
    """Pack one KV head's keys and values of some blocks, and say how many panels of 32 keys that is.

    Keys go to panels one after the other, values to panels of 32 columns, each for all keys. `layer` is:
    addresses of the keys and the values, bytes from block to block, tokens a block, numbers a head.
    """
    keys, values, block_bytes, size, head_dim = layer
    row_bytes, parts = head_dim * 2, size // KEYS_AT_ONCE
    num_packed = len(blocks) * parts
    panels = (num_packed + 1) // 2
    key_panel, value_panel = row_bytes * COLUMNS, value_panel_bytes(panels)
    half_rows = KEYS_AT_ONCE // 2 * ROW_BYTES
    for number in range(num_packed):
        slot = number % parts * KEYS_AT_ONCE
        at = blocks[number // parts] * block_bytes + (kv_head * size + slot) * row_bytes
        side = (number % 2) * TILE_BYTES
        pack_keys(keys + at, row_bytes, keys_to + (number // 2) * key_panel + side)
        for column in range(head_dim // COLUMNS):
            to = values_to + column * value_panel + number * half_rows
            pack_values(values + at + column * TILE_BYTES, row_bytes, to)
    if num_packed % 2:
        # No key is there: its weight is 0, and 0 * NaN would be NaN.
        for column in range(head_dim // COLUMNS):
            clear_rows(values_to + column * value_panel + num_packed * half_rows)
    return panels


@njit
def value_panel_bytes(panels: Any) -> Any:
    """Bytes of 32 columns of the values in so many panels of keys."""
    return panels * COLUMNS * COLUMNS * 2


@njit
def weight_bytes(panels: Any) -> Any:
    """From one query's weights to the next one's: an odd number of lines, so that not all of them fall
    into one set of the cache."""
    return (panels | 1) * TILE_BYTES


@njit
def work_bytes(panels: Any, head_dim: Any) -> Any:
    """Memory for one job of up to so many panels of keys: see `parts_of`."""
    packed = 2 * panels * COLUMNS * head_dim * 2
    return packed + (panels + 1) * SCORE_BYTES + MOST_ROWS * weight_bytes(panels) + TILE_BYTES


@njit
def parts_of(memory: Any, panels: Any, head_dim: Any) -> Any:
    """Where packed keys, packed values, scores, weights and sums lie in `memory`, by address."""
    keys = (memory.ctypes.data + TILE_BYTES - 1) // TILE_BYTES * TILE_BYTES
    values = keys + panels * COLUMNS * head_dim * 2
    scores = values + panels * COLUMNS * head_dim * 2
    weights = scores + panels * SCORE_BYTES
    return keys, values, scores, weights, weights + MOST_ROWS * weight_bytes(panels)
