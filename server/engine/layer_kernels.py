"""The CPU's fast path for what stands between a layer's products: RMSNorm, gated SiLU, rotation, scales.

transformers writes each as five or six operations on whole tensors; here each is one pass over its
rows. Every intermediate result is rounded where transformers rounds it, so that the results are the
same but for the last bit of a sum or of exp. A row's result does not depend on the others.

Compiled by numba, run on torch's own OpenMP threads: see `decode_kernel`. Knows tensors; no model.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from server.engine.openmp import Kernel
from server.engine.vector_loops import VERSION, add_and_square, normalise, scale, sum_of_squares
from server.engine.vector_loops import silu_times as silu_times_row
from server.engine.vector_ops import LANES, array_at, float_of_bits, round_like, take_number

# No contraction: a product is rounded before it is added to, as in torch. Only sums may be reordered.
_SUM_FLAGS = {"reassoc", "nsz"}
_ELEMENTS_FOR_THREADS = 1 << 13

# Fields of a job table, int64. The first four are common to all kernels.
_NEXT_ROW, _TABLE_AT, _ROWS, _WIDTH = range(4)
_SIZE = 16
# Fields of `rotate_fields` and `scale_fields` that change from step to step.
COS_FIELD, SIN_FIELD, SLOTS_FIELD = 5, 6, 6
_ENTRY = types.void(types.voidptr)
# Rows that a thread takes together: one by one, two threads took longer over 512 rows than one, since
# what they count with went from cache to cache.
_TOGETHER = 4


@njit
def _take_rows(table: Any) -> Any:
    """First and end of the next rows; none are left where they are equal."""
    first = min(take_number(table[_TABLE_AT]) * _TOGETHER, table[_ROWS])
    return first, min(first + _TOGETHER, table[_ROWS])


@njit(fastmath=_SUM_FLAGS)
def _sum_of_squares(x: Any) -> Any:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        value = float_of_bits(x[i])
        total += value * value
    return total


@njit
def _norm_odd_row(x: Any, weight: Any, out: Any, added: Any, eps: Any) -> None:
    """A row whose width is no multiple of LANES."""
    for i in range(len(added)):
        x[i] = round_like(float_of_bits(x[i]) + float_of_bits(added[i]), x[i])
    mean = _sum_of_squares(x) / np.float32(len(x))
    inverse = np.float32(1.0) / np.sqrt(mean + eps)
    for i in range(len(x)):
        normal = float_of_bits(round_like(float_of_bits(x[i]) * inverse, out[i]))
        out[i] = round_like(float_of_bits(weight[i]) * normal, out[i])


@njit
def _norm_rows(table: Any, like: Any) -> None:
    """Fields: x, weight, out, bits of eps as float64, what is added to x in place (or 0). Dense rows."""
    width = table[_WIDTH]
    row_bytes = width * like.itemsize
    weight = carray(array_at(table[5]), (width,), like.dtype)
    eps = np.float32(carray(array_at(table[_TABLE_AT] + 7 * 8), (1,), np.float64)[0])
    first, end = _take_rows(table)
    while first < end:
        for row in range(first, end):
            x_at, out_at = table[4] + row * row_bytes, table[6] + row * row_bytes
            added_at = table[8] + row * row_bytes if table[8] else 0
            if width % LANES:
                x = carray(array_at(x_at), (width,), like.dtype)
                out = carray(array_at(out_at), (width,), like.dtype)
                added = carray(array_at(added_at), (width if added_at else 0,), like.dtype)
                _norm_odd_row(x, weight, out, added, eps)
            else:
                if added_at:
                    squares = add_and_square(x_at, added_at, width, like)
                else:
                    squares = sum_of_squares(x_at, width, like)
                inverse = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
                normalise(x_at, inverse, table[5], out_at, width, like)
        first, end = _take_rows(table)


@njit
def _gate_rows(table: Any, like: Any) -> None:
    """Fields: gate, up (elements from row to row in 7 and 8), out (dense rows)."""
    width, size = table[_WIDTH], like.itemsize
    first, end = _take_rows(table)
    while first < end:
        for row in range(first, end):
            gate_at, up_at = table[4] + row * table[7] * size, table[5] + row * table[8] * size
            silu_times_row(gate_at, up_at, table[6] + row * width * size, width, like)
        first, end = _take_rows(table)


@njit
def _rotate_head(head: Any, cos: Any, sin: Any, half: Any) -> None:
    for i in range(half):
        low, high = float_of_bits(head[i]), float_of_bits(head[half + i])
        low_cos = float_of_bits(round_like(low * float_of_bits(cos[i]), head[i]))
        low_sin = float_of_bits(round_like(low * float_of_bits(sin[half + i]), head[i]))
        high_cos = float_of_bits(round_like(high * float_of_bits(cos[half + i]), head[i]))
        high_sin = float_of_bits(round_like(high * float_of_bits(sin[i]), head[i]))
        head[i] = round_like(low_cos - high_sin, head[i])
        head[half + i] = round_like(high_cos + low_sin, head[i])


@njit
def _rotate_rows(table: Any, like: Any) -> None:
    """Fields: heads, cos, sin (dense rows), number of heads, elements from row to row, from head to
    head. `_WIDTH` is that of a head."""
    width, size = table[_WIDTH], like.itemsize
    first, end = _take_rows(table)
    while first < end:
        for row in range(first, end):
            cos = carray(array_at(table[5] + row * width * size), (width,), like.dtype)
            sin = carray(array_at(table[6] + row * width * size), (width,), like.dtype)
            for index in range(table[7]):
                at = table[4] + (row * table[8] + index * table[9]) * size
                _rotate_head(carray(array_at(at), (width,), like.dtype), cos, sin, width // 2)
        first, end = _take_rows(table)


@njit
def _scale_rows(table: Any, like: Any) -> None:
    """Fields: x, scales (dense float32 rows), slots (int64), out, elements from row to row of x and of
    out. Slot 0 leaves a row as it is."""
    width, size = table[_WIDTH], like.itemsize
    whole = width // LANES * LANES
    slots = carray(array_at(table[6]), (table[_ROWS],), np.int64)
    first, end = _take_rows(table)
    while first < end:
        for row in range(first, end):
            x_at, out_at = table[4] + row * table[8] * size, table[7] + row * table[9] * size
            x = carray(array_at(x_at), (width,), like.dtype)
            out = carray(array_at(out_at), (width,), like.dtype)
            if slots[row]:
                at = table[5] + slots[row] * width * 4
                scales = carray(array_at(at), (width,), np.float32)
                if whole:
                    scale(x_at, at, out_at, whole, like)
                for i in range(whole, width):
                    out[i] = round_like(float_of_bits(x[i]) * scales[i], out[i])
            elif table[4] != table[7]:
                for i in range(width):
                    out[i] = x[i]
        first, end = _take_rows(table)


# The compiled function, compiled at first use; `version` as in `vector_loops`.
@cache
def norm_kernel(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    """What runs `rms_norm`; its tables are of `norm_fields`."""
    if dtype == torch.bfloat16:

        @cfunc(_ENTRY, cache=True)
        def norm_bf16(table_at: Any) -> None:
            if version:
                _norm_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(norm_bf16)

    @cfunc(_ENTRY, cache=True)
    def norm_float32(table_at: Any) -> None:
        if version:
            _norm_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(norm_float32)


@cache
def gate_kernel(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    """What runs `silu_times`; its tables are of `gate_fields`."""
    if dtype == torch.bfloat16:

        @cfunc(_ENTRY, cache=True)
        def gate_bf16(table_at: Any) -> None:
            if version:
                _gate_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(gate_bf16)

    @cfunc(_ENTRY, cache=True)
    def gate_float32(table_at: Any) -> None:
        if version:
            _gate_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(gate_float32)


@cache
def rotate_kernel(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    """What runs `rotate`; its tables are of `rotate_fields`."""
    if dtype == torch.bfloat16:

        @cfunc(_ENTRY, cache=True)
        def rotate_bf16(table_at: Any) -> None:
            if version:
                _rotate_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(rotate_bf16)

    @cfunc(_ENTRY, cache=True)
    def rotate_float32(table_at: Any) -> None:
        if version:
            _rotate_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(rotate_float32)


@cache
def scale_kernel(dtype: torch.dtype, version: int = VERSION) -> Kernel:
    """What runs `scale_rows`; its tables are of `scale_fields`."""
    if dtype == torch.bfloat16:

        @cfunc(_ENTRY, cache=True)
        def scale_bf16(table_at: Any) -> None:
            if version:
                _scale_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.uint16))

        return Kernel(scale_bf16)

    @cfunc(_ENTRY, cache=True)
    def scale_float32(table_at: Any) -> None:
        if version:
            _scale_rows(carray(table_at, (_SIZE,), np.int64), np.zeros(1, np.float32))

    return Kernel(scale_float32)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, added: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., d), weight (d,) of the same dtype -> (..., d). Zhang & Sennrich (2019).

    Args:
        x: what is normalised.
        weight: times it.
        eps: held against small numbers.
        added: like x and dense as x is; first added to x, in place.
    """
    dense = x.contiguous()
    if added is not None and not (x.is_contiguous() and added.is_contiguous()):
        raise ValueError("what is added to must be dense")
    out = torch.empty_like(dense)
    addition = 0 if added is None else added.data_ptr()
    ends = (dense.data_ptr(), weight.data_ptr(), out.data_ptr())
    fields = norm_fields(*ends, eps, addition, x.shape[-1])
    _run(norm_kernel(x.dtype), fields, x.numel() // max(x.shape[-1], 1), x.numel())
    return out


def norm_fields(
    x: int, weight: int, out: int, eps: float, added: int, width: int
) -> tuple[int, ...]:
    """A table of `norm_kernel`: addresses (`added` may be 0) of dense rows."""
    return (0, 0, 0, width, x, weight, out, _bits(eps), added)


@cache
def _bits(number: float) -> int:
    """A float64's bits."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


def silu_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, each (..., d) with equal distances between rows -> (..., d)."""
    width = gate.shape[-1]
    rows, other = _rows_of(gate), _rows_of(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    ends = (rows.data_ptr(), other.data_ptr(), out.data_ptr())
    fields = gate_fields(*ends, (rows.stride(0), other.stride(0)), width)
    _run(gate_kernel(gate.dtype), fields, rows.shape[0], gate.numel())
    return out


def gate_fields(
    gate: int, up: int, out: int, strides: tuple[int, int], width: int
) -> tuple[int, ...]:
    """A table of `gate_kernel`: addresses, and elements from row to row of gate and up."""
    return (0, 0, 0, width, gate, up, out, *strides)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads (T, H, D) in place, by halves: cos and sin (T, D). Su et al. (2021).

    As transformers' `apply_rotary_pos_emb`: x * cos + (-x[D/2:], x[:D/2]) * sin.
    """
    num_rows, num_heads, width = heads.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    ends = (heads.data_ptr(), cos.data_ptr(), sin.data_ptr())
    fields = rotate_fields(*ends, num_heads, heads.stride(0), heads.stride(1), width)
    _run(rotate_kernel(heads.dtype), fields, num_rows, heads.numel())


def rotate_fields(
    heads: int, cos: int, sin: int, num_heads: int, row_stride: int, head_stride: int, width: int
) -> tuple[int, ...]:
    """A table of `rotate_kernel`: addresses, and elements from row to row and from head to head."""
    return (0, 0, 0, width, heads, cos, sin, num_heads, row_stride, head_stride)


def scale_rows(
    x: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor, *, in_place: bool
) -> torch.Tensor:
    """Row t of x times row slots[t] of a table; slot 0 leaves a row as it is.

    Args:
        x: (1, T, d), rows dense.
        scales: (N, d) float32, dense.
        slots: (T,) int64.
        in_place: write to x; else to a new tensor.
    """
    width, num_rows = x.shape[-1], x.shape[-2]
    if x.stride(-1) != 1:
        raise ValueError(f"rows must be dense, strides are {x.stride()}")
    out = x if in_place else torch.empty(x.shape, dtype=x.dtype)
    ends = (x.data_ptr(), scales.data_ptr(), slots.data_ptr(), out.data_ptr())
    fields = scale_fields(*ends, (x.stride(-2), out.stride(-2)), width)
    _run(scale_kernel(x.dtype), fields, num_rows, x.numel())
    return out


def scale_fields(
    x: int, scales: int, slots: int, out: int, strides: tuple[int, int], width: int
) -> tuple[int, ...]:
    """A table of `scale_kernel`: addresses, and elements from row to row of x and out."""
    return (0, 0, 0, width, x, scales, slots, out, *strides)


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels serve this device and dtype."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float32)


def prepare(dtype: torch.dtype) -> None:
    """Compile everything now, so that no request waits for it."""
    for kernel in (norm_kernel, gate_kernel, rotate_kernel, scale_kernel):
        kernel(dtype)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """(..., d) as (T, d) whose rows are dense; a copy only where they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _run(kernel: Kernel, fields: tuple[int, ...], num_rows: int, num_elements: int) -> None:
    # Not numpy's: it takes five times as long to fill, eight times in every layer.
    table = (ctypes.c_int64 * _SIZE)(*fields)
    table[_TABLE_AT] = at = ctypes.addressof(table)
    table[_ROWS] = num_rows
    # Below that, handing rows to a second thread takes longer than they do.
    kernel.run(at, 1 if num_elements < _ELEMENTS_FOR_THREADS else num_rows)
