"""The kernels' inner loops over vectors.

numba's own loops over arrays reload and store their accumulators at every turn, since nothing tells
LLVM that the arrays do not overlap; that was half of the decode kernel's time. These intrinsics name
the registers. Elements are float32 or bf16 as the type of the array `like` says; sums are kept in
float32, in one fixed order. Lengths are multiples of LANES unless said otherwise.

HEADS query heads that read the same keys and values go through a loop together: each is then loaded
and widened once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.vector_ops import (
    F32,
    I32,
    LANES,
    Loop,
    constant,
    exp,
    fma,
    integer,
    load,
    max_lane,
    rounded,
    size_of,
    splat,
    store,
    sum_lanes,
)


def _version() -> int:
    here = Path(__file__)
    parts = [
        here.with_name(name).read_bytes()
        for name in ("vector_ops.py", "tiles.py", "tile_loops.py", here.name)
    ]
    return int.from_bytes(hashlib.sha256(b"".join([bytes([LANES]), *parts])).digest()[:6])


# numba keeps compiled kernels by the file they stand in, and does not see that these files changed.
# A kernel that names this number in a closure is compiled again when they did. Each kernel's entry is
# written out beside it: one that closes over another compiled function is not kept at all.
VERSION = _version()

HEADS = 4
# Columns of values that one loop sums, in registers.
_WIDE = 4
WIDE = _WIDE * LANES
# Keys that one loop scores.
KEYS = 4
_CACHE_LINE = 64


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
    return builder.shuffle_vector(a, b, mask)


def _sums_of_four(builder: Any, vectors: list[Any]) -> Any:
    """(4,): the sum of each vector's lanes, halves added to halves as `sum_lanes` does."""
    half, quarter = LANES // 2, LANES // 4
    low, high = list(range(half)), list(range(half, LANES))
    pairs = []
    for a, b in (vectors[:2], vectors[2:]):
        first = _shuffled(builder, a, b, low + [LANES + i for i in low])
        second = _shuffled(builder, a, b, high + [LANES + i for i in high])
        pairs.append(builder.fadd(first, second))
    lows = [part * half + i for part in range(4) for i in range(quarter)]
    highs = [index + quarter for index in lows]
    total = builder.fadd(_shuffled(builder, *pairs, lows), _shuffled(builder, *pairs, highs))
    width = quarter
    while width > 1:
        lows = [part * width + i for part in range(4) for i in range(width // 2)]
        highs = [index + width // 2 for index in lows]
        nothing = ir.Constant(total.type, ir.Undefined)
        total = builder.fadd(
            _shuffled(builder, total, nothing, lows), _shuffled(builder, total, nothing, highs)
        )
        width //= 2
    return total


def _dots_of(builder: Any, arguments: Any, element: Any, heads: int, keys: int) -> None:
    """scores[h, k] = query[h] . key[k] for `heads` heads and `keys` keys."""
    query, query_bytes, key, key_bytes, length, scores, score_bytes = arguments
    zero = constant(0.0)
    loop = Loop(builder, length, LANES, [zero] * (heads * keys))
    after = []
    at_query = builder.add(query, builder.mul(loop.index, integer(4)))
    at_key = builder.add(key, builder.mul(loop.index, integer(size_of(element))))
    queries = [
        load(builder, builder.add(at_query, builder.mul(query_bytes, integer(h))), types.float32)
        for h in range(heads)
    ]
    for k in range(keys):
        at = builder.add(at_key, builder.mul(key_bytes, integer(k)))
        vector = load(builder, at, element)
        after += [
            fma(builder, queries[h], vector, loop.values[k * heads + h]) for h in range(heads)
        ]
    loop.close(after)
    for h in range(heads):
        at = builder.add(scores, builder.mul(score_bytes, integer(h)))
        mine = after[h::heads]
        total = sum_lanes(builder, *mine) if keys == 1 else _sums_of_four(builder, mine)
        builder.store(total, builder.inttoptr(at, total.type.as_pointer()), align=4)


def _add_columns(builder: Any, arguments: Any, element: Any, heads: int, tile: int) -> None:
    """sums[h, 0:tile * LANES] += weights[h] @ values[:, 0:tile * LANES]."""
    weights, weight_bytes, values, row_bytes, count, sums, sum_bytes = arguments
    places = [
        builder.add(builder.add(sums, builder.mul(sum_bytes, integer(h))), integer(4 * LANES * i))
        for h in range(heads)
        for i in range(tile)
    ]
    loop = Loop(builder, count, 1, [load(builder, at, types.float32) for at in places])
    row = builder.add(values, builder.mul(loop.index, row_bytes))
    columns = [
        load(builder, builder.add(row, integer(size_of(element) * LANES * i)), element)
        for i in range(tile)
    ]
    after = []
    for h in range(heads):
        at = builder.add(weights, builder.mul(weight_bytes, integer(h)))
        at = builder.add(at, builder.mul(loop.index, integer(4)))
        weight = splat(builder, builder.load(builder.inttoptr(at, F32.as_pointer()), align=4))
        after += [fma(builder, weight, columns[i], loop.values[h * tile + i]) for i in range(tile)]
    loop.close(after)
    for at, value in zip(places, after, strict=True):
        store(builder, value, at, types.float32)


def _loop_for(write: Callable[..., None], heads: int, tile: int) -> Any:
    """`_dots_of` or `_add_columns` for so many heads, as an intrinsic."""

    @intrinsic
    def loop(
        typing_context: Any, given: Any, given_bytes: Any, read: Any, read_bytes: Any, length: Any,
        out: Any, out_bytes: Any, like: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            write(builder, arguments[:7], like.dtype, heads, tile)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, like), generate

    return loop


def _by_heads(write: Callable[..., None], tile: int) -> Any:
    """The same for 1 to HEADS heads, whose number is its first argument."""
    one, two, three, four = (_loop_for(write, heads, tile) for heads in range(1, HEADS + 1))

    @njit
    def loop(
        heads: Any, given: Any, given_bytes: Any, read: Any, read_bytes: Any, length: Any, out: Any,
        out_bytes: Any, like: Any,
    ) -> None:  # fmt: skip
        if heads == 4:
            four(given, given_bytes, read, read_bytes, length, out, out_bytes, like)
        elif heads == 3:
            three(given, given_bytes, read, read_bytes, length, out, out_bytes, like)
        elif heads == 2:
            two(given, given_bytes, read, read_bytes, length, out, out_bytes, like)
        else:
            one(given, given_bytes, read, read_bytes, length, out, out_bytes, like)

    return loop


# Scores of 1 to HEADS heads against one key, or against KEYS keys whose scores lie side by side.
# Arguments: number of heads; addresses of the queries (float32), the keys and the scores (float32),
# after each of them the bytes from head to head (keys: from key to key), and before the scores the
# length of a query; an array of the keys' type.
dots = _by_heads(_dots_of, 1)
dots_of_keys = _by_heads(_dots_of, KEYS)

# sums += weights @ values for 1 to HEADS heads and the first LANES, or WIDE, columns. Arguments: number
# of heads; addresses of the weights (float32), the values and the sums (float32), after each of them the
# bytes from head to head (values: from row to row), and before the sums the number of rows, at least
# one; an array of the values' type.
weighted_sums = _by_heads(_add_columns, 1)
weighted_sums_wide = _by_heads(_add_columns, _WIDE)


def _largest_of(builder: Any, x_at: Any, number: Any) -> Any:
    """The largest of float32 at an address; NaN is passed over."""
    loop = Loop(builder, number, LANES, [constant(float("-inf"))])
    at = builder.add(x_at, builder.mul(loop.index, integer(4)))
    each = load(builder, at, types.float32)
    larger = builder.fcmp_ordered(">", each, loop.values[0])
    best = builder.select(larger, each, loop.values[0])
    loop.close([best])
    return max_lane(builder, best)


@intrinsic
def softmax(typing_context: Any, scores: Any, length: Any) -> Any:
    """Softmax of the `length` float32 at address `scores`, in place; -inf weighs nothing.

    A NaN, or an infinity that is not below all others, makes all of them NaN.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores_at, number = arguments

        def at(loop: Loop) -> Any:
            return builder.add(scores_at, builder.mul(loop.index, integer(4)))

        best = splat(builder, _largest_of(builder, scores_at, number))

        loop = Loop(builder, number, LANES, [constant(0.0)])
        place = at(loop)
        each = exp(builder, builder.fsub(load(builder, place, types.float32), best))
        store(builder, each, place, types.float32)
        total = builder.fadd(loop.values[0], each)
        loop.close([total])
        inverse = builder.fdiv(ir.Constant(F32, 1.0), sum_lanes(builder, total))
        inverse = splat(builder, inverse)

        loop = Loop(builder, number, LANES, [])
        place = at(loop)
        each = builder.fmul(load(builder, place, types.float32), inverse)
        store(builder, each, place, types.float32)
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def largest(typing_context: Any, x: Any, length: Any) -> Any:
    """The largest of the `length` float32 at address `x`; NaN is passed over."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _largest_of(builder, *arguments)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def largest_or_nan(typing_context: Any, x: Any, length: Any, like: Any) -> Any:
    """The largest of the `length` elements at address `x`, or NaN where any of them is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, number, _ = arguments
        none = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)
        loop = Loop(builder, number, LANES, [constant(float("-inf")), none])
        at = builder.add(x_at, builder.mul(loop.index, integer(size_of(like.dtype))))
        each = load(builder, at, like.dtype)
        larger = builder.fcmp_ordered(">", each, loop.values[0])
        best = builder.select(larger, each, loop.values[0])
        bad = builder.or_(loop.values[1], builder.fcmp_unordered("uno", each, each))
        loop.close([best, bad])
        lanes = ir.IntType(LANES)
        any_bad = builder.icmp_unsigned("!=", builder.bitcast(bad, lanes), ir.Constant(lanes, 0))
        return builder.select(any_bad, ir.Constant(F32, float("nan")), max_lane(builder, best))

    return types.float32(types.int64, types.int64, like), generate


@intrinsic
def exponentials(typing_context: Any, x: Any, length: Any) -> Any:
    """exp of the `length` float32 <= 0 at address `x`, in place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        loop = Loop(builder, arguments[1], LANES, [])
        at = builder.add(arguments[0], builder.mul(loop.index, integer(4)))
        store(builder, exp(builder, load(builder, at, types.float32)), at, types.float32)
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def silu_times(typing_context: Any, gate: Any, up: Any, out: Any, length: Any, like: Any) -> Any:
    """out = silu(gate) * up over `length` elements at these addresses; silu is rounded first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = like.dtype
        loop = Loop(builder, arguments[3], LANES, [])
        offset = builder.mul(loop.index, integer(size_of(element)))
        gate_at, up_at, out_at = (builder.add(at, offset) for at in arguments[:3])
        x = load(builder, gate_at, element)
        positive = builder.fcmp_ordered(">=", x, constant(0.0))
        # Not fneg of x: the sign of a NaN or a zero does not matter here.
        below_zero = builder.select(positive, builder.fsub(constant(0.0), x), x)
        e = exp(builder, below_zero)
        numerator = builder.select(positive, constant(1.0), e)
        sigmoid = builder.fdiv(numerator, builder.fadd(constant(1.0), e))
        silu = rounded(builder, builder.fmul(x, sigmoid), element)
        store(builder, builder.fmul(silu, load(builder, up_at, element)), out_at, element)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, like), generate


def _sum_of_squares(builder: Any, x_at: Any, added_at: Any, number: Any, element: Any) -> Any:
    """Of `number` elements; with an `added_at` they are first added to, in place."""
    loop = Loop(builder, number, LANES, [constant(0.0)])
    offset = builder.mul(loop.index, integer(size_of(element)))
    x = load(builder, builder.add(x_at, offset), element)
    if added_at is not None:
        total = builder.fadd(x, load(builder, builder.add(added_at, offset), element))
        x = rounded(builder, total, element)
        store(builder, x, builder.add(x_at, offset), element)
    squares = fma(builder, x, x, loop.values[0])
    loop.close([squares])
    return sum_lanes(builder, squares)


@intrinsic
def sum_of_squares(typing_context: Any, x: Any, length: Any, like: Any) -> Any:
    """Of the `length` elements at address `x`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _sum_of_squares(builder, arguments[0], None, arguments[1], like.dtype)

    return types.float32(types.int64, types.int64, like), generate


@intrinsic
def add_and_square(typing_context: Any, x: Any, added: Any, length: Any, like: Any) -> Any:
    """x += added over `length` elements at these addresses; the sum of their squares then."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _sum_of_squares(builder, *arguments[:3], like.dtype)

    return types.float32(types.int64, types.int64, types.int64, like), generate


@intrinsic
def normalise(
    typing_context: Any, x: Any, factor: Any, weight: Any, out: Any, length: Any, like: Any
) -> Any:
    """out = weight * (x * factor) over `length` elements at these addresses, each product rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, factor_now, weight_at, out_at, number, _ = arguments
        same, element = splat(builder, factor_now), like.dtype
        loop = Loop(builder, number, LANES, [])
        offset = builder.mul(loop.index, integer(size_of(element)))
        each = builder.fmul(load(builder, builder.add(x_at, offset), element), same)
        each = rounded(builder, each, element)
        each = builder.fmul(load(builder, builder.add(weight_at, offset), element), each)
        store(builder, each, builder.add(out_at, offset), element)
        loop.close([])
        return context.get_dummy_value()

    integers = [types.int64] * 3
    return types.void(types.int64, types.float32, *integers, like), generate


@intrinsic
def scale(typing_context: Any, x: Any, scales: Any, out: Any, length: Any, like: Any) -> Any:
    """out = x * scales over `length` elements at these addresses; scales are float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_at, scales_at, out_at, number, _ = arguments
        loop = Loop(builder, number, LANES, [])
        offset = builder.mul(loop.index, integer(size_of(like.dtype)))
        factor_at = builder.add(scales_at, builder.mul(loop.index, integer(4)))
        factor = load(builder, factor_at, types.float32)
        each = builder.fmul(load(builder, builder.add(x_at, offset), like.dtype), factor)
        store(builder, each, builder.add(out_at, offset), like.dtype)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, like), generate


@intrinsic
def prefetch(typing_context: Any, address: Any, length: Any) -> Any:
    """Ask for `length` >= 1 bytes from `address` on, ahead of their use; any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kinds = [pointer, I32, I32, I32]
        function_type = ir.FunctionType(ir.VoidType(), kinds)
        function = get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        loop = Loop(builder, arguments[1], _CACHE_LINE, [])
        at = builder.inttoptr(builder.add(arguments[0], loop.index), pointer)
        builder.call(function, [at, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        loop.close([])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
