"""Products of few rows with weights that oneDNN has packed, on the processor's matrix tiles (AMX).

For single tokens a product is as fast as its weights can be read, and oneDNN read them at two thirds of
what the machine gives: with 150 layers of 1,536 x 576 on two cores it took 14.5 ms for 1 row and 18.5 for
32, this kernel 11.3 and 15.6. It reads oneDNN's own copy, whose layout is looked at first, so that nothing
is packed twice; beyond PRODUCT_ROWS, where arithmetic counts, oneDNN is ahead and takes over. Up to 32 rows
the results are oneDNN's to the last bit (a test holds them to it); with more, its sums take another order.

Rejected: prefetching (the hardware does as well), huge pages (no difference), three tiles of rows at once
(more loads a product), tiles for larger steps (oneDNN is 15 % faster at 192 rows; from 48 to 128 it is as
fast).

Knows one weight and its rows; no model.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from server.engine.openmp import Kernel
from server.engine.tile_loops import product
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
from server.engine.vector_ops import Loop, integer, load, store, take_number

# Rows of a step at most.
PRODUCT_ROWS = 4 * MOST_ROWS

# Fields of a job table, int64: addresses, sizes, bytes from row to row.
(
    _NEXT_JOB, _TABLE_AT, _ROWS, _INPUTS, _JOBS, _X, _X_BYTES, _WEIGHT, _OUT, _OUT_BYTES, _SHAPES,
    _BIAS, _TABLE_SIZE,
) = range(13)  # fmt: skip


@intrinsic
def _round_rows(
    typing_context: Any, sums: Any, bias: Any, out: Any, out_bytes: Any, rows: Any
) -> Any:
    """out = sums + bias, as bf16: 32 columns of `rows` rows; bias is 32 float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_at, bias_at, out_at, row_bytes, num_rows = arguments
        loop = Loop(builder, num_rows, 1, [])
        from_at = builder.add(sums_at, builder.mul(loop.index, integer(COLUMNS * 4)))
        to_at = builder.add(out_at, builder.mul(loop.index, row_bytes))
        for half in range(2):
            offset = integer(half * TILE_BYTES)
            total = load(builder, builder.add(from_at, offset), types.float32)
            added = load(builder, builder.add(bias_at, offset), types.float32)
            to = builder.add(to_at, integer(half * TILE_BYTES // 2))
            store(builder, builder.fadd(total, added), to, types.uint16)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit
def _take_jobs(table: Any) -> None:
    """Take panels of 32 columns until none is left; any number of threads may do so at once."""
    sums = np.empty(MOST_ROWS * COLUMNS, np.float32)
    panel = table[_INPUTS] * COLUMNS * 2
    shaped = 0
    job = take_number(table[_TABLE_AT])
    while job < table[_JOBS]:
        weight = table[_WEIGHT] + job * panel
        bias, out = table[_BIAS] + job * COLUMNS * 4, table[_OUT] + job * COLUMNS * 2
        # The panel is near after the first rows.
        for first in range(0, table[_ROWS], MOST_ROWS):
            rows = min(MOST_ROWS, table[_ROWS] - first)
            if rows != shaped:
                shape_tiles(table[_SHAPES] + (rows - 1) * TILE_BYTES)
                shaped = rows
            x, x_bytes = table[_X] + first * table[_X_BYTES], table[_X_BYTES]
            product(rows, x, x_bytes, weight, panel, sums.ctypes.data)
            to = out + first * table[_OUT_BYTES]
            _round_rows(sums.ctypes.data, bias, to, table[_OUT_BYTES], rows)
        job = take_number(table[_TABLE_AT])
    release_tiles()


@cache
def _entry(version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _take_jobs(carray(table_at, (_TABLE_SIZE,), np.int64))

    return Kernel(run)


class TileProduct:
    """x @ weight.T + bias for up to PRODUCT_ROWS rows; `of` makes it.

    Args:
        packed: what `mkldnn._reorder_linear_weight` made of the weight. It is held.
        weight: (N, K) bf16.
        bias: (N,) or None.

    Attributes:
        entry: what is run.
    """

    def __init__(self, packed: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._width, inputs = weight.shape
        added = torch.zeros(self._width) if bias is None else bias.float()
        self._held = (packed, added)
        self.entry = _entry()
        # Filled in place: see `layer_kernels`.
        self._table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = ctypes.addressof(self._table)
        self._table[_TABLE_AT] = self._at
        self._table[_INPUTS], self._table[_JOBS] = inputs, self._width // COLUMNS
        self._table[_WEIGHT] = torch.ops.mkldnn.data_ptr(packed)
        self._table[_BIAS] = added.data_ptr()
        self._table[_OUT_BYTES] = self._width * 2
        self._table[_SHAPES] = shapes_at(1)

    @staticmethod
    def of(packed: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> TileProduct | None:
        """The product, or None where the processor, the sizes or oneDNN's layout are others."""
        columns, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or columns % COLUMNS or inputs % DEPTH:
            return None
        if not has_tiles() or not _is_in_panels(packed, weight):
            return None
        return TileProduct(packed, weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 with dense rows, 1 <= M <= PRODUCT_ROWS -> (M, N). Not for two threads at once."""
        num_rows = x.shape[0]
        out = torch.empty((num_rows, self._width), dtype=x.dtype)
        table = self._table
        table[_NEXT_JOB], table[_ROWS] = 0, num_rows
        table[_X], table[_X_BYTES], table[_OUT] = x.data_ptr(), x.stride(0) * 2, out.data_ptr()
        self.entry.run(self._at, table[_JOBS])
        return out

    def fields(self, x_at: int, x_bytes: int, out_at: int) -> tuple[int, ...]:
        """A table of `entry`, but for the rows; `x_bytes` lie from row to row."""
        table = list(self._table)
        table[_X], table[_X_BYTES], table[_OUT] = x_at, x_bytes, out_at
        return tuple(table)


def _is_in_panels(packed: Any, weight: torch.Tensor) -> bool:
    """Whether oneDNN keeps 32 columns together, two numbers of each side by side: (N/32, K/2, 32, 2).

    Looks at the first and the last panel.
    """
    columns, inputs = weight.shape
    if torch.ops.mkldnn._nbytes(packed) != columns * inputs * 2:
        return False
    panel = COLUMNS * inputs
    at = torch.ops.mkldnn.data_ptr(packed)
    for first in (0, columns - COLUMNS):
        some = weight[first : first + COLUMNS].view(torch.int16).reshape(COLUMNS, -1, 2)
        there = (ctypes.c_int16 * panel).from_address(at + first * inputs * 2)
        if not np.array_equal(
            some.transpose(0, 1).reshape(-1).numpy(), np.ctypeslib.as_array(there)
        ):
            return False
    return True
