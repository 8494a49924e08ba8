"""Products of few rows with weights that oneDNN has packed, on the processor's matrix tiles (AMX).

For single tokens a product is as fast as its weights can be read, and oneDNN read them at two thirds of
what the machine gives: with 150 layers of 1,536 x 576 on two cores it took 14.5 ms for 1 row and 18.5 for
32, this kernel 11.3 and 15.6. It reads oneDNN's own copy, whose layout is looked at first, so that nothing
is packed twice; beyond MOST_ROWS, where arithmetic counts, oneDNN is ahead and takes over. Up to there
the results are the same to the last bit (a test holds them to it).

Rejected: prefetching (the hardware does as well), huge pages (no difference), three tiles of rows at once
(more loads a product), tiles for larger steps (oneDNN is 10 to 25 % faster from 96 rows on).

Knows one weight and its rows; no model.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.openmp import Kernel
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import Loop, integer, load, store, take_number

# A tile holds 16 rows of 64 bytes.
_TILE_ROWS, _TILE_BYTES = 16, 64
# Columns of one job, and numbers of an input row that one turn of its loop reads.
_COLUMNS, _DEPTH = 32, 32
MOST_ROWS = 2 * _TILE_ROWS

# Fields of a job table, int64: addresses, sizes, bytes from row to row.
(
    _NEXT_JOB, _TABLE_AT, _ROWS, _INPUTS, _JOBS, _X, _X_BYTES, _WEIGHT, _OUT, _OUT_BYTES, _SHAPES,
    _BIAS, _TABLE_SIZE,
) = range(13)  # fmt: skip

_I8 = ir.IntType(8)
_POINTER = _I8.as_pointer()
# Linux asks for a permission once a process before it lets tiles hold anything.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def _call(builder: Any, name: str, arguments: list[Any]) -> None:
    kinds = [argument.type for argument in arguments]
    function = ir.FunctionType(ir.VoidType(), kinds)
    builder.call(get_or_insert_function(builder.module, function, f"llvm.x86.{name}"), arguments)


def _tile(number: int) -> Any:
    return ir.Constant(_I8, number)


def _load_tile(builder: Any, tile: int, address: Any, row_bytes: Any) -> None:
    _call(builder, "tileloadd64", [_tile(tile), builder.inttoptr(address, _POINTER), row_bytes])


@intrinsic
def _shape_tiles(typing_context: Any, shapes: Any) -> Any:
    """Tell the processor the tiles' shapes: 64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _release_tiles(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), generate


def _product_of(row_tiles: int) -> Any:
    """Sums of `row_tiles` * 16 rows and 32 columns, as an intrinsic.

    Its arguments: address of the rows, bytes from row to row, address and bytes of the packed columns,
    address of the sums (float32, 32 a row). Sums are tiles 0 to 3, rows 4 and 5, columns 6 and 7.
    """

    @intrinsic
    def product(
        typing_context: Any, x: Any, x_bytes: Any, weight: Any, weight_bytes: Any, sums: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x_at, row_bytes, weight_at, num_bytes, sums_at = arguments
            for tile in range(2 * row_tiles):
                _call(builder, "tilezero", [_tile(tile)])
            loop = Loop(builder, num_bytes, _COLUMNS * _DEPTH * 2, [])
            at_weight = builder.add(weight_at, loop.index)
            at_x = builder.add(x_at, builder.udiv(loop.index, integer(_COLUMNS)))
            pair_bytes = integer(_COLUMNS * 4)  # two numbers of each column lie side by side
            _load_tile(builder, 6, at_weight, pair_bytes)
            at_other = builder.add(at_weight, integer(_TILE_BYTES))
            _load_tile(builder, 7, at_other, pair_bytes)
            for part in range(row_tiles):
                down = builder.mul(row_bytes, integer(part * _TILE_ROWS))
                _load_tile(builder, 4 + part, builder.add(at_x, down), row_bytes)
                for side in range(2):
                    tiles = [_tile(2 * part + side), _tile(4 + part), _tile(6 + side)]
                    _call(builder, "tdpbf16ps", tiles)
            loop.close([])
            for tile in range(2 * row_tiles):
                down = (tile // 2) * _TILE_ROWS * _COLUMNS * 4 + (tile % 2) * _TILE_BYTES
                to = builder.inttoptr(builder.add(sums_at, integer(down)), _POINTER)
                _call(builder, "tilestored64", [_tile(tile), to, integer(_COLUMNS * 4)])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return product


_product_of_16, _product_of_32 = _product_of(1), _product_of(2)


@intrinsic
def _round_rows(
    typing_context: Any, sums: Any, bias: Any, out: Any, out_bytes: Any, rows: Any
) -> Any:
    """out = sums + bias, as bf16: 32 columns of `rows` rows; bias is 32 float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_at, bias_at, out_at, row_bytes, num_rows = arguments
        loop = Loop(builder, num_rows, 1, [])
        from_at = builder.add(sums_at, builder.mul(loop.index, integer(_COLUMNS * 4)))
        to_at = builder.add(out_at, builder.mul(loop.index, row_bytes))
        for half in range(2):
            offset = integer(half * _TILE_BYTES)
            total = load(builder, builder.add(from_at, offset), types.float32)
            added = load(builder, builder.add(bias_at, offset), types.float32)
            to = builder.add(to_at, integer(half * _TILE_BYTES // 2))
            store(builder, builder.fadd(total, added), to, types.uint16)
        loop.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@njit
def _take_jobs(table: Any) -> None:
    """Take panels of 32 columns until none is left; any number of threads may do so at once."""
    sums = np.empty(MOST_ROWS * _COLUMNS, np.float32)
    panel = table[_INPUTS] * _COLUMNS * 2
    few = table[_ROWS] <= _TILE_ROWS
    job = take_number(table[_TABLE_AT])
    if job < table[_JOBS]:
        _shape_tiles(table[_SHAPES])
    while job < table[_JOBS]:
        weight = table[_WEIGHT] + job * panel
        if few:
            _product_of_16(table[_X], table[_X_BYTES], weight, panel, sums.ctypes.data)
        else:
            _product_of_32(table[_X], table[_X_BYTES], weight, panel, sums.ctypes.data)
        bias, out = table[_BIAS] + job * _COLUMNS * 4, table[_OUT] + job * _COLUMNS * 2
        _round_rows(sums.ctypes.data, bias, out, table[_OUT_BYTES], table[_ROWS])
        job = take_number(table[_TABLE_AT])
    _release_tiles()


@cache
def _entry(version: int = VERSION) -> Kernel:
    """What is called, compiled when first asked for; `version` see `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _take_jobs(carray(table_at, (_TABLE_SIZE,), np.int64))

    return Kernel(run)


@cache
def _shapes() -> np.ndarray:
    """(MOST_ROWS, 64) bytes: the tiles' shapes for 1, 2, ... rows, as `ldtilecfg` reads them."""
    shapes = np.zeros((MOST_ROWS, 64), np.uint8)
    for index, shape in enumerate(shapes):
        rows = [min(index + 1, _TILE_ROWS), max(index + 1 - _TILE_ROWS, 0)]
        tiles = [rows[0], rows[0], rows[1], rows[1], *rows, _TILE_ROWS, _TILE_ROWS]
        shape[0] = 1  # the only palette
        shape[16:32].view(np.uint16)[:] = [_TILE_BYTES if count else 0 for count in tiles]
        shape[48:56] = tiles
    return shapes


@cache
def has_tiles() -> bool:
    """Whether this process may use the processor's tiles; asks Linux for the permission."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512f")):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    permission = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return bool(permission == 0)


class TileProduct:
    """x @ weight.T + bias for up to MOST_ROWS rows; `of` makes it.

    Args:
        packed: what `mkldnn._reorder_linear_weight` made of the weight. It is held.
        weight: (N, K) bf16.
        bias: (N,) or None.

    Attributes:
        entry: what is run.
    """

    SHAPES_FIELD = _SHAPES

    def __init__(self, packed: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._width, inputs = weight.shape
        added = torch.zeros(self._width) if bias is None else bias.float()
        self._held = (packed, added, _shapes())
        self.entry = _entry()
        # Filled in place: see `layer_kernels`.
        self._table = (ctypes.c_int64 * _TABLE_SIZE)()
        self._at = ctypes.addressof(self._table)
        self._table[_TABLE_AT] = self._at
        self._table[_INPUTS], self._table[_JOBS] = inputs, self._width // _COLUMNS
        self._table[_WEIGHT] = torch.ops.mkldnn.data_ptr(packed)
        self._table[_BIAS] = added.data_ptr()
        self._table[_OUT_BYTES] = self._width * 2

    @staticmethod
    def of(packed: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> TileProduct | None:
        """The product, or None where the processor, the sizes or oneDNN's layout are others."""
        columns, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or columns % _COLUMNS or inputs % _DEPTH:
            return None
        if not has_tiles() or not _is_in_panels(packed, weight):
            return None
        return TileProduct(packed, weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (M, K) bf16 with dense rows, 1 <= M <= MOST_ROWS -> (M, N). Not for two threads at once."""
        num_rows = x.shape[0]
        out = torch.empty((num_rows, self._width), dtype=x.dtype)
        table = self._table
        table[_NEXT_JOB], table[_ROWS] = 0, num_rows
        table[_X], table[_X_BYTES], table[_OUT] = x.data_ptr(), x.stride(0) * 2, out.data_ptr()
        table[_SHAPES] = self.shapes_at(num_rows)
        self.entry.run(self._at, table[_JOBS])
        return out

    def fields(self, x_at: int, x_bytes: int, out_at: int) -> tuple[int, ...]:
        """A table of `entry`, but for the rows and their shapes; `x_bytes` lie from row to row."""
        table = list(self._table)
        table[_X], table[_X_BYTES], table[_OUT] = x_at, x_bytes, out_at
        return tuple(table)

    @staticmethod
    @cache
    def shapes_at(num_rows: int) -> int:
        """What stands in SHAPES_FIELD for so many rows."""
        return int(_shapes()[num_rows - 1].ctypes.data)


def _is_in_panels(packed: Any, weight: torch.Tensor) -> bool:
    """Whether oneDNN keeps 32 columns together, two numbers of each side by side: (N/32, K/2, 32, 2).

    Looks at the first and the last panel.
    """
    columns, inputs = weight.shape
    if torch.ops.mkldnn._nbytes(packed) != columns * inputs * 2:
        return False
    panel = _COLUMNS * inputs
    at = torch.ops.mkldnn.data_ptr(packed)
    for first in (0, columns - _COLUMNS):
        some = weight[first : first + _COLUMNS].view(torch.int16).reshape(_COLUMNS, -1, 2)
        there = (ctypes.c_int16 * panel).from_address(at + first * inputs * 2)
        if not np.array_equal(
            some.transpose(0, 1).reshape(-1).numpy(), np.ctypeslib.as_array(there)
        ):
            return False
    return True
