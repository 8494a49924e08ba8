"""Vector loops for `decode_kernel`, written in LLVM's terms.

numba's own loops over arrays reload and store their accumulators at every turn, since nothing tells
LLVM that the arrays do not overlap; that was half of the kernel's time. These intrinsics name the
registers. Elements of the KV blocks are float32, or the bits of a bf16 (uint16): the type of the
array `like` says which. Sums are kept in float32, in one fixed order.

Memory is given by address, lengths are multiples of LANES, and bounds are the caller's affair.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

LANES = 8
# Accumulators that `weighted_sum` keeps in registers at once.
_TILE = 8

_F32 = ir.FloatType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _int(value: int) -> Any:
    return ir.Constant(_I64, value)


def _load(builder: Any, address: Any, element: Any) -> Any:
    """LANES floats from `address`, where elements of numba's type `element` lie."""
    bf16 = element == types.uint16
    kind = ir.VectorType(_I16, LANES) if bf16 else _VECTOR
    raw = builder.load(builder.inttoptr(address, kind.as_pointer()), align=2 if bf16 else 4)
    if not bf16:
        return raw
    wide_type = ir.VectorType(_I32, LANES)
    wide = builder.shl(builder.zext(raw, wide_type), ir.Constant(wide_type, [16] * LANES))
    return builder.bitcast(wide, _VECTOR)


def _bytes(element: Any) -> int:
    return 2 if element == types.uint16 else 4


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, a vector each, rounded once."""
    function_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(get_or_insert_function(builder.module, function_type, name), [a, b, c])


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        one, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halves added to halves."""
    lanes = LANES
    while lanes > 1:
        half = lanes // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        indices = ir.VectorType(_I32, half)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(indices, list(range(half))))
        high = builder.shuffle_vector(
            vector, undefined, ir.Constant(indices, list(range(half, lanes)))
        )
        vector, lanes = builder.fadd(low, high), half
    return builder.extract_element(vector, ir.Constant(_I32, 0))


class _Loop:
    """`for index in range(0, end, step)` with values carried round; `end` is at least `step`."""

    def __init__(self, builder: Any, end: Any, step: int, carried: list[Any]) -> None:
        self._builder, self._end, self._step = builder, end, step
        before = builder.block
        self._body = builder.append_basic_block("body")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.index = builder.phi(_I64)
        self.index.add_incoming(_int(0), before)
        self.values = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.values.append(phi)

    def close(self, values: list[Any]) -> None:
        """End the body; `values` are what it carries on, and what is left after the last turn."""
        builder = self._builder
        following = builder.add(self.index, _int(self._step))
        again = builder.icmp_signed("<", following, self._end)
        end_of_body = builder.block
        self.index.add_incoming(following, end_of_body)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, end_of_body)
        after = builder.append_basic_block("after")
        builder.cbranch(again, self._body, after)
        builder.position_at_end(after)


@intrinsic
def dot(typing_context: Any, query: Any, key: Any, length: Any, like: Any) -> Any:
    """Sum of `length` products: float32 at address `query`, elements like `like` at `key`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query_at, key_at, number, _ = arguments
        loop = _Loop(builder, number, LANES, [ir.Constant(_VECTOR, [0.0] * LANES)])
        (total,) = loop.values
        q_at = builder.add(query_at, builder.mul(loop.index, _int(4)))
        k_at = builder.add(key_at, builder.mul(loop.index, _int(_bytes(like.dtype))))
        q, k = _load(builder, q_at, types.float32), _load(builder, k_at, like.dtype)
        total = _fma(builder, q, k, total)
        loop.close([total])
        return _sum_lanes(builder, total)

    return types.float32(types.int64, types.int64, types.int64, like), generate


def _tile_of_sums(builder: Any, arguments: Any, element: Any, tile: int) -> None:
    """sums[0:tile * LANES] += weights @ values[:, 0:tile * LANES]."""
    weights, values, count, sums, row_bytes = arguments
    places = [builder.add(sums, _int(4 * LANES * i)) for i in range(tile)]
    loop = _Loop(builder, count, 1, [_load(builder, at, types.float32) for at in places])
    at_weight = builder.add(weights, builder.mul(loop.index, _int(4)))
    weight = _splat(builder, builder.load(builder.inttoptr(at_weight, _F32.as_pointer()), align=4))
    row = builder.add(values, builder.mul(loop.index, row_bytes))
    after = []
    for i, running in enumerate(loop.values):
        at = builder.add(row, _int(_bytes(element) * LANES * i))
        after.append(_fma(builder, weight, _load(builder, at, element), running))
    loop.close(after)
    for at, value in zip(places, after, strict=True):
        builder.store(value, builder.inttoptr(at, _VECTOR.as_pointer()), align=4)


def _weighted_sum(tile: int) -> Any:
    @intrinsic
    def weighted_sum(
        typing_context: Any, weights: Any, values: Any, count: Any, sums: Any, row: Any, like: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _tile_of_sums(builder, arguments[:5], like.dtype, tile)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, like), generate

    return weighted_sum


# weighted_sum(weights, values, count, sums, row_bytes, like): sums += weights @ values, for the
# first WIDE (or LANES) columns of `count` >= 1 rows of values that lie `row_bytes` apart.
WIDE = _TILE * LANES
weighted_sum_wide = _weighted_sum(_TILE)
weighted_sum_narrow = _weighted_sum(1)


@intrinsic
def array_at(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def take_number(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, which becomes one more: no two threads get the same."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _int(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """A float32 from itself, or from the bits of a bf16 (uint16) or of a float32 (an integer)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.float32:
            return value
        if bits == types.uint16:
            value = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
        elif value.type != _I32:
            value = builder.trunc(value, _I32)
        return builder.bitcast(value, _F32)

    return types.float32(bits), generate


@intrinsic
def round_like(typing_context: Any, value: Any, like: Any) -> Any:
    """A float32 as itself, or as the bits of the nearest bf16 (ties to even), by `like`'s type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if like == types.float32:
            return number
        bits = builder.bitcast(number, _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), _I16)

    return like(types.float32, like), generate
