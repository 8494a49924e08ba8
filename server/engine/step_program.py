"""A step through all layers of a `LayerStack` in one call.

Called one by one from Python, each on threads started for it, the kernels of a step of 32 rows took 32 ms;
this way 26.5. Those of 16 rows and a chunk of 32 tokens took 35 to 45 along a prompt of 2,000; this way 27
to 38. Their job tables stand in a list that is made once; each step fills in what is new, and torch's
threads go through the list. After a kernel a thread waits until no other is inside it, not until all have
come: one that the system runs elsewhere holds nobody up.

Only where every product has tiles and takes the step's rows, and kernels attend from all of them: else the
stack calls the same kernels one by one, with the same results. Knows the stack's layers and kernels; no
sequence or adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic

from server.engine import layer_kernels
from server.engine.attention import AttentionPath
from server.engine.decode_kernel import DecodeKernel
from server.engine.layers import Layer, Products
from server.engine.openmp import Kernel
from server.engine.scales import ScaleTables
from server.engine.tile_product import PRODUCT_ROWS
from server.engine.vector_loops import VERSION
from server.engine.vector_ops import I32, I64, array_at

# Fields of the program's own table, int64: the address of the list, its length, the address of `usleep`. Of
# an entry: function, table, how many threads are inside, whether they are waited for.
_LIST, _LENGTH, _SLEEP, _PROGRAM_SIZE = range(4)
_FUNCTION, _TABLE, _INSIDE, _WAITS, _ENTRY_SIZE = range(5)
# Numbers of one kernel's table, at most. Where its next job or row, its own address and its number of rows
# stand in those of `layer_kernels` and `tile_product`; attention's are written by its plan.
_WIDTH = 40
_NEXT, _TABLE_AT, _ROWS = range(3)
_POINTER = ir.IntType(8).as_pointer()
# Pauses before a waiting thread leaves its processor, some 50 microseconds, and for how many of those: a
# thread that waits for one that the system holds up elsewhere makes room for it to come.
_PATIENCE, _NAP = 1000, 20


@intrinsic
def _call_at(typing_context: Any, address: Any, argument: Any) -> Any:
    """Call the void function of one pointer at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_POINTER]).as_pointer()
        function = builder.inttoptr(arguments[0], kind)
        builder.call(function, [builder.inttoptr(arguments[1], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _sleep_at(typing_context: Any, address: Any, microseconds: Any) -> Any:
    """Call `usleep`, which stands at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I32, [I32]).as_pointer()
        function = builder.inttoptr(arguments[0], kind)
        builder.call(function, [builder.trunc(arguments[1], I32)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _add_at(typing_context: Any, address: Any, number: Any) -> Any:
    """Add to the int64 at `address`; who sees the sum there sees what this thread wrote before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _number_at(typing_context: Any, address: Any) -> Any:
    """The int64 at `address`, after a short pause."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@njit
def _run_list(table: Any) -> None:
    """Go through the list. A kernel returns when it has no job left to take, so that it is done once
    no thread is inside; a later thread finds nothing to take. A thread inside a program that is not waited
    for counts as inside the next."""
    kernels = carray(array_at(table[_LIST]), (table[_LENGTH], _ENTRY_SIZE), np.int64)
    for index in range(table[_LENGTH]):
        counted = index + 1 - kernels[index, _WAITS]
        inside_at = table[_LIST] + (counted * _ENTRY_SIZE + _INSIDE) * 8
        _add_at(inside_at, 1)
        _call_at(kernels[index, _FUNCTION], kernels[index, _TABLE])
        _add_at(inside_at, -1)
        waited = 0
        while kernels[index, _WAITS] and _number_at(inside_at) != 0:
            waited += 1
            if waited >= _PATIENCE:
                _sleep_at(table[_SLEEP], _NAP)


@cache
def _entry(version: int = VERSION) -> Kernel:
    """The compiled function, compiled at first use; `version` as in `vector_loops`."""

    @cfunc(types.void(types.voidptr), cache=True)
    def run(table_at: Any) -> None:
        if version:
            _run_list(carray(table_at, (_PROGRAM_SIZE,), np.int64))

    return Kernel(run)


class _Buffer:
    """(PRODUCT_ROWS, width) numbers that every layer writes over."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty((PRODUCT_ROWS, width), dtype=dtype)
        self.width = width
        self._at = self.tensor.data_ptr()

    def at(self, column: int = 0) -> int:
        """The address of a column of the first row."""
        return self._at + column * self.tensor.element_size()


class StepProgram:
    """The layers of one stack, for up to PRODUCT_ROWS tokens; `of` makes it.

    Args:
        layers: of the stack, alike in their shapes.
        scales: what linear layers are scaled by.
        kernel: what attends.
    """

    def __init__(self, layers: Sequence[Layer], scales: ScaleTables, kernel: DecodeKernel) -> None:
        self._layers = layers
        self._scales = scales
        self._kernel = kernel
        self._indices = [layer.index for layer in layers]
        self._windows = [layer.window or 0 for layer in layers]
        self._entry = _entry()
        weight = layers[0].before[0]
        self._dtype = weight.dtype
        widths = [sum(layers[0].qkv.sizes), sum(layers[0].gate_up.sizes)]
        inputs = [layers[0].output.inputs, layers[0].down.inputs]
        self._hidden, self._normal, self._added = (
            _Buffer(weight.shape[0], self._dtype) for _ in range(3)
        )
        self._qkv, self._gate_up, self._attended, self._gated = (
            _Buffer(width, self._dtype) for width in (*widths, *inputs)
        )
        self._build()

    @staticmethod
    def of(
        layers: Sequence[Layer], scales: ScaleTables, kernel: DecodeKernel
    ) -> StepProgram | None:
        """The program, or None where a layer needs what it has not."""
        alike = {(layer.head_dim, layer.scale, layer.qkv.sizes) for layer in layers}
        if len(alike) != 1 or any(layer.query_norm is not None for layer in layers):
            return None
        if any(product.tiles is None for layer in layers for product in layer.products):
            return None
        return StepProgram(layers, scales, kernel)

    def fits(self, num_rows: int, path: AttentionPath) -> bool:
        """Whether a step of so many rows, with the scales that it uses, can be run."""
        if self._num_tables != self._scales.num_tables:
            self._build()
        if num_rows > PRODUCT_ROWS or path.fast is None or path.rows:
            return False
        return not (self._scales.in_use and self._needs_second_products)

    def run(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, path: AttentionPath
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (n, d) -> hidden states (n, d) and what the last layer adds to them, (n, d).

        For a step that `fits`. Both are good until the next call. `cos` and `sin` are (n, D), dense;
        `path` is of these n rows.
        """
        num_rows, tables = len(hidden), self._tables
        self._hidden.tensor[:num_rows] = hidden
        tables[:, _NEXT] = 0
        tables[:, _ROWS] = num_rows
        tables[self._rotations, layer_kernels.COS_FIELD] = cos.data_ptr()
        tables[self._rotations, layer_kernels.SIN_FIELD] = sin.data_ptr()
        in_use = self._scales.in_use
        tables[self._scalings, _ROWS] = num_rows if in_use else 0
        tables[self._scalings, layer_kernels.SLOTS_FIELD] = self._scales.slots.data_ptr()
        self._plan_attention(path, num_rows)
        self._entry.run(self._at, torch.get_num_threads())
        return self._hidden.tensor[:num_rows], self._added.tensor[:num_rows]

    def _plan_attention(self, path: AttentionPath, num_rows: int) -> None:
        plan, tiles = path.fast, path.tiles
        assert plan is not None  # noqa: S101 - as `fits` has seen
        first = self._layers[0]
        parts = torch.split_with_sizes(self._qkv.tensor[:num_rows], first.qkv.sizes, dim=1)
        query, keys, values = (part.view(num_rows, -1, first.head_dim) for part in parts)
        out = self._attended.tensor[:num_rows].view(query.shape)
        plan.set_layer(first.index, query, keys, values, out, scale=first.scale)
        each = (self._indices, self._windows)
        for number, places in enumerate((self._puts, self._attentions)[-plan.num_passes :]):
            self._fill(places, plan.write_layers, *each, number)
        if plan.prefixes is not None:
            self._fill(self._prefixes, plan.prefixes.write_layers, self._indices)
        if tiles is not None:
            tiles.set_layer(first.index, query, out, scale=first.scale)
            self._fill(self._prompts, tiles.write_layers, *each)
        calls = self._calls_of(plan.num_passes > 1, plan.prefixes is not None, tiles is not None)
        self._program[_LIST], self._program[_LENGTH] = calls.ctypes.data, len(calls)

    def _fill(self, places: list[int], write_layers: Callable[..., None], *given: Any) -> None:
        """Fill in the tables of one kernel, one a layer, by its plan's `write_layers`."""
        tables = np.zeros((len(self._layers), _WIDTH), np.int64)
        write_layers(tables, self._addresses[places], *given)
        self._tables[places] = tables

    def _calls_of(self, has_puts: bool, has_prefixes: bool, has_prompts: bool) -> np.ndarray:
        """The list without what this step has not."""
        key = (has_puts, has_prefixes, has_prompts)
        if key not in self._lists:
            kinds = (self._puts, self._prefixes, self._prompts)
            absent = [
                i for places, there in zip(kinds, key, strict=True) if not there for i in places
            ]
            self._lists[key] = np.delete(self._calls, absent, axis=0)
        return self._lists[key]

    # --- the list --------------------------------------------------------------------------

    def _build(self) -> None:
        """Write the list anew; scales are in it where a table of them is there."""
        self._num_tables = self._scales.num_tables
        # An input that is scaled for one of several layers needs a product of its own.
        self._needs_second_products = any(
            self._scales.input_table(name) is not None
            for layer in self._layers
            for product in (layer.qkv, layer.gate_up)
            for name in product.names
        )
        self._list: list[tuple[Kernel, tuple[int, ...]]] = []
        self._products: list[int] = []
        self._rotations: list[int] = []
        self._scalings: list[int] = []
        self._attentions: list[int] = []
        self._prefixes: list[int] = []
        self._puts: list[int] = []
        self._prompts: list[int] = []
        for number, layer in enumerate(self._layers):
            self._add_layer(layer, is_first=number == 0)
        length = len(self._list)
        self._tables = np.zeros((length, _WIDTH), np.int64)
        self._addresses = self._tables.ctypes.data + np.arange(length) * self._tables.strides[0]
        self._calls = np.zeros((length, _ENTRY_SIZE), np.int64)
        self._calls[:, _FUNCTION] = [kernel.address for kernel, _ in self._list]
        self._calls[:, _TABLE] = self._addresses
        # Prompts and single tokens are attended side by side: the former are few jobs, and long ones.
        self._calls[:, _WAITS] = 1
        self._calls[self._prompts, _WAITS] = 0
        self._lists: dict[tuple[bool, bool, bool], np.ndarray] = {}
        for index, (_, fields) in enumerate(self._list):
            self._tables[index, : len(fields)] = fields
        self._tables[:, _TABLE_AT] = self._addresses
        self._program = (ctypes.c_int64 * _PROGRAM_SIZE)()
        self._at = ctypes.addressof(self._program)
        sleep = int(ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0)
        self._program[_SLEEP] = sleep

    def _add(self, kernel: Kernel, fields: tuple[int, ...]) -> int:
        self._list.append((kernel, fields))
        return len(self._list) - 1

    def _add_layer(self, layer: Layer, *, is_first: bool) -> None:
        heads = sum(layer.qkv.sizes[:2]) // layer.head_dim
        self._add_norm(layer.before, 0 if is_first else self._added.at())
        self._add_product(layer.qkv, self._normal, self._qkv)
        fields = layer_kernels.rotate_fields(
            self._qkv.at(), 0, 0, heads, self._qkv.width, layer.head_dim, layer.head_dim
        )
        self._rotations.append(self._add(layer_kernels.rotate_kernel(self._dtype), fields))
        if self._kernel.prefixes is not None:
            self._prefixes.append(self._add(self._kernel.prefixes.entry, ()))
        self._puts.append(self._add(self._kernel.entry, ()))
        if self._kernel.prefixes is not None:  # who has tiles has both
            self._prompts.append(self._add(self._kernel.prefixes.tiles.entry, ()))
        self._attentions.append(self._add(self._kernel.entry, ()))
        self._add_product(layer.output, self._attended, self._added)
        self._add_norm(layer.after, self._added.at())
        self._add_product(layer.gate_up, self._normal, self._gate_up)
        gate, up = self._gate_up.at(), self._gate_up.at(layer.gate_up.sizes[0])
        strides = (self._gate_up.width, self._gate_up.width)
        fields = layer_kernels.gate_fields(gate, up, self._gated.at(), strides, self._gated.width)
        self._add(layer_kernels.gate_kernel(self._dtype), fields)
        self._add_product(layer.down, self._gated, self._added)

    def _add_norm(self, norm: tuple[torch.Tensor, float], added_at: int) -> None:
        weight, eps = norm
        fields = layer_kernels.norm_fields(
            self._hidden.at(), weight.data_ptr(), self._normal.at(), eps, added_at, weight.shape[0]
        )
        self._add(layer_kernels.norm_kernel(self._dtype), fields)

    def _add_product(self, product: Products, x: _Buffer, out: _Buffer) -> None:
        if len(product.names) == 1:
            self._add_scales(self._scales.input_table(product.names[0]), x, 0)
        tiles = product.tiles
        if tiles is None:
            raise ValueError("a product without tiles")
        self._products.append(self._add(tiles.entry, tiles.fields(x.at(), x.width * 2, out.at())))
        column = 0
        for name, size in zip(product.names, product.sizes, strict=True):
            self._add_scales(self._scales.output_table(name), out, column)
            column += size

    def _add_scales(self, table: torch.Tensor | None, buffer: _Buffer, column: int) -> None:
        if table is None:
            return
        at, stride = buffer.at(column), buffer.width
        fields = layer_kernels.scale_fields(
            at, table.data_ptr(), 0, at, (stride, stride), table.shape[1]
        )
        self._scalings.append(self._add(layer_kernels.scale_kernel(self._dtype), fields))
