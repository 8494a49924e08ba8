"""What the kernels' loops are made of: vectors of floats in LLVM's terms, and a few scalars.

Elements in memory are float32, or the bits of a bf16 (uint16): numba's type `element` says which.
Memory is given by address, and bounds are the caller's affair. Knows no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

# Floats that one register holds.
_FEATURES = binding.get_host_cpu_features()
LANES = 16 if _FEATURES.get("avx512f") else 8
# Whether the processor has an instruction for it; elsewhere LLVM would call a function that is not there.
# In place of six others it saves 3 % of a step of 32 rows.
_ROUNDS = bool(LANES == 16 and _FEATURES.get("avx512bf16"))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bf16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


F32 = ir.FloatType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
VECTOR_I32 = ir.VectorType(I32, LANES)


def integer(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def load(builder: Any, address: Any, element: Any) -> Any:
    """LANES floats from `address`, where elements of numba's type `element` lie."""
    bf16 = element == types.uint16
    kind = ir.VectorType(I16, LANES) if bf16 else VECTOR
    raw = builder.load(builder.inttoptr(address, kind.as_pointer()), align=2 if bf16 else 4)
    if not bf16:
        return raw
    return _widened(builder, raw)


def size_of(element: Any) -> int:
    """Bytes of one element."""
    return 2 if element == types.uint16 else 4


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, a vector each, rounded once."""
    function_type = ir.FunctionType(VECTOR, [VECTOR] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(get_or_insert_function(builder.module, function_type, name), [a, b, c])


def splat(builder: Any, scalar: Any) -> Any:
    """A vector with `scalar` in every lane."""
    undefined = ir.Constant(VECTOR, ir.Undefined)
    one = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(
        one, undefined, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    )


def sum_lanes(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, halves added to halves."""
    return _fold_lanes(builder, vector, builder.fadd)


def _fold_lanes(builder: Any, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    lanes = LANES
    while lanes > 1:
        half = lanes // 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        indices = ir.VectorType(I32, half)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(indices, list(range(half))))
        high = builder.shuffle_vector(
            vector, undefined, ir.Constant(indices, list(range(half, lanes)))
        )
        vector, lanes = join(low, high), half
    return builder.extract_element(vector, ir.Constant(I32, 0))


class Loop:
    """`for index in range(0, end, step)` with values carried round; `end` is at least `step`."""

    def __init__(self, builder: Any, end: Any, step: int, carried: list[Any]) -> None:
        self._builder, self._end, self._step = builder, end, step
        before = builder.block
        self._body = builder.append_basic_block("body")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.index = builder.phi(I64)
        self.index.add_incoming(integer(0), before)
        self.values = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.values.append(phi)

    def close(self, values: list[Any]) -> None:
        """End the body; `values` are what it carries on, and what is left after the last turn."""
        builder = self._builder
        following = builder.add(self.index, integer(self._step))
        again = builder.icmp_signed("<", following, self._end)
        end_of_body = builder.block
        self.index.add_incoming(following, end_of_body)
        for phi, value in zip(self.values, values, strict=True):
            phi.add_incoming(value, end_of_body)
        after = builder.append_basic_block("after")
        builder.cbranch(again, self._body, after)
        builder.position_at_end(after)


def store(builder: Any, vector: Any, address: Any, element: Any) -> None:
    """LANES floats to `address`, rounded to `element`."""
    if element == types.uint16:
        vector = _as_bf16(builder, vector)
    pointer = builder.inttoptr(address, vector.type.as_pointer())
    builder.store(vector, pointer, align=size_of(element))


def rounded(builder: Any, vector: Any, element: Any) -> Any:
    """Each float as `element` holds it."""
    if element != types.uint16:
        return vector
    return _widened(builder, _as_bf16(builder, vector))


def _as_bf16(builder: Any, vector: Any) -> Any:
    """The bits of the nearest bf16, ties to even."""
    if not _ROUNDS:
        bits = _bf16_bits(builder, builder.bitcast(vector, VECTOR_I32))
        return builder.trunc(bits, ir.VectorType(I16, LANES))
    narrow = builder.fptrunc(vector, ir.VectorType(_BFloat(), LANES))
    return builder.bitcast(narrow, ir.VectorType(I16, LANES))


def _widened(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, VECTOR_I32), _same(16))
    return builder.bitcast(wide, VECTOR)


def _bf16_bits(builder: Any, bits: Any) -> Any:
    """The upper halves of float32 bits, a vector or one, rounded to nearest, ties to even."""
    one, half, places = (ir.Constant(I32, n) for n in (1, 0x7FFF, 16))
    if bits.type != I32:
        one, half, places = _same(1), _same(0x7FFF), _same(16)
    odd = builder.and_(builder.lshr(bits, places), one)
    return builder.lshr(builder.add(builder.add(bits, half), odd), places)


def _same(value: int) -> Any:
    return ir.Constant(VECTOR_I32, [value] * LANES)


def constant(value: float) -> Any:
    """A vector of one number, as float32 holds it."""
    return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)


_NO_FRACTION = 1.5 * 2**23


def exp(builder: Any, x: Any) -> Any:
    """exp of a vector of x <= 0: Cephes' expf. 0 where x < -87; NaN stays NaN."""
    too_small = builder.fcmp_ordered("<", x, constant(-87.0))
    kept = builder.select(too_small, constant(-87.0), x)
    # A sum with so large a number has no room for a fraction, and its last bits are the whole part.
    shifted = fma(builder, kept, constant(1.44269504), constant(_NO_FRACTION))
    n = builder.fsub(shifted, constant(_NO_FRACTION))
    r = fma(builder, n, constant(-0.693359375), kept)
    r = fma(builder, n, constant(2.12194440e-4), r)
    p = constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5):
        p = fma(builder, p, r, constant(factor))
    p = builder.fadd(fma(builder, builder.fmul(p, r), r, r), constant(1.0))
    power = builder.shl(builder.bitcast(shifted, VECTOR_I32), _same(23))
    power = builder.bitcast(builder.add(power, _same(127 << 23)), VECTOR)
    return builder.select(too_small, constant(0.0), builder.fmul(p, power))


def max_lane(builder: Any, vector: Any) -> Any:
    """The largest of a vector's lanes, none of which is NaN."""
    return _fold_lanes(
        builder, vector, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b)
    )


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
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, integer(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """A float32 from itself, or from the bits of a bf16 (uint16) or of a float32 (an integer)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if bits == types.float32:
            return value
        if bits == types.uint16:
            value = builder.shl(builder.zext(value, I32), ir.Constant(I32, 16))
        elif value.type != I32:
            value = builder.trunc(value, I32)
        return builder.bitcast(value, F32)

    return types.float32(bits), generate


@intrinsic
def round_like(typing_context: Any, value: Any, like: Any) -> Any:
    """A float32 as itself, or as the bits of the nearest bf16 (ties to even), by `like`'s type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if like == types.float32:
            return number
        return builder.trunc(_bf16_bits(builder, builder.bitcast(number, I32)), I16)

    return like(types.float32, like), generate
