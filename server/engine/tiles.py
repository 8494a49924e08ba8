"""The processor's matrix tiles (AMX): a product of a few rows with packed columns, as instructions.

Columns are packed by 32: two numbers of each lie side by side, (K/2, 32, 2) bf16 a panel, as oneDNN keeps
weights. Knows addresses only.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine.vector_ops import Loop, integer

# A tile holds 16 rows of 64 bytes.
TILE_ROWS, TILE_BYTES = 16, 64
# Columns of one job, and numbers of an input row that one turn of its loop reads.
COLUMNS, DEPTH = 32, 32
MOST_ROWS = 2 * TILE_ROWS

_I8 = ir.IntType(8)
_POINTER = _I8.as_pointer()
# A process must request permission from Linux once before it can use tiles.
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
def shape_tiles(typing_context: Any, shapes: Any) -> Any:
    """Load the tiles' configuration: 64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def release_tiles(typing_context: Any) -> Any:
    """Release the tiles."""

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
            loop = Loop(builder, num_bytes, COLUMNS * DEPTH * 2, [])
            at_weight = builder.add(weight_at, loop.index)
            at_x = builder.add(x_at, builder.udiv(loop.index, integer(COLUMNS)))
            pair_bytes = integer(COLUMNS * 4)  # two numbers of each column lie side by side
            _load_tile(builder, 6, at_weight, pair_bytes)
            at_other = builder.add(at_weight, integer(TILE_BYTES))
            _load_tile(builder, 7, at_other, pair_bytes)
            for part in range(row_tiles):
                down = builder.mul(row_bytes, integer(part * TILE_ROWS))
                _load_tile(builder, 4 + part, builder.add(at_x, down), row_bytes)
                for side in range(2):
                    tiles = [_tile(2 * part + side), _tile(4 + part), _tile(6 + side)]
                    _call(builder, "tdpbf16ps", tiles)
            loop.close([])
            for tile in range(2 * row_tiles):
                down = (tile // 2) * TILE_ROWS * COLUMNS * 4 + (tile % 2) * TILE_BYTES
                to = builder.inttoptr(builder.add(sums_at, integer(down)), _POINTER)
                _call(builder, "tilestored64", [_tile(tile), to, integer(COLUMNS * 4)])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return product


product_of_16, product_of_32 = _product_of(1), _product_of(2)


@cache
def _shapes() -> np.ndarray:
    """(MOST_ROWS, 64) bytes: the tiles' shapes for 1, 2, ... rows, as `ldtilecfg` reads them."""
    shapes = np.zeros((MOST_ROWS, 64), np.uint8)
    for index, shape in enumerate(shapes):
        rows = [min(index + 1, TILE_ROWS), max(index + 1 - TILE_ROWS, 0)]
        tiles = [rows[0], rows[0], rows[1], rows[1], *rows, TILE_ROWS, TILE_ROWS]
        shape[0] = 1  # the only palette
        shape[16:32].view(np.uint16)[:] = [TILE_BYTES if count else 0 for count in tiles]
        shape[48:56] = tiles
    return shapes


@cache
def has_tiles() -> bool:
    """Whether this process may use AMX tiles; requests the permission from Linux."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name) for name in ("amx-tile", "amx-bf16", "avx512f")):
        return False
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    permission = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return bool(permission == 0)


@cache
def shapes_at(num_rows: int) -> int:
    """The address of the tiles' shapes for so many rows."""
    return int(_shapes()[num_rows - 1].ctypes.data)
