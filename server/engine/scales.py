"""IA3 on the device: tables of scales and the hooks that apply them.

For every module that some resident adapter targets there is a table (num_slots + 1, width) for its
input, its output, or both; row 0 is all ones. The base's modules stay as they are: forward hooks
multiply the slice of tokens that uses scales, and no other. They are registered when a module is
first targeted and return at once in a step in which no token uses scales. `layer_stack` calls no
modules and asks for the same by name.

Rejected: gathering a row of ones for every other token (half a step at 32 rows on two cores).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adapters.base_model import BaseModelSpec
from adapters.parts import ActivationScales
from server.engine.layer_kernels import scale_rows


class ScaleTables:
    """Tables and hooks of one model.

    Args:
        model: the base.
        spec: its dimensions.
        num_slots: IA3 adapters resident at once.
        device: where the tables lie.
        fast: let `layer_kernels` do it.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: BaseModelSpec,
        num_slots: int,
        device: torch.device,
        *,
        fast: bool,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._spec = spec
        self._num_rows = num_slots + 1
        self._device = device
        self._fast = fast
        self._inputs: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._targets: dict[int, ActivationScales] = {}
        self._span: slice | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        self._slots = torch.empty(0, dtype=torch.long)

    def set_rows(self, slots: list[int]) -> None:
        """Say which row of the tables each packed token (T,) uses in the coming step.

        Tokens that use scales (slot > 0) stand together, so that a hook works on one slice.
        """
        used = [index for index, slot in enumerate(slots) if slot]
        if not used:
            self._span = None
            return
        start, end = used[0], used[-1] + 1
        if end - start != len(used):
            raise ValueError("tokens that use scales must stand together in a step")
        self._span = slice(start, end)
        self._slots = torch.tensor(slots, device=self._device)
        self._rows = self._slots[start:end]

    def install(self, slot: int, scales: ActivationScales) -> None:
        """Fill row `slot`; what its last user had targeted beyond `scales` goes back to one."""
        self._reset(slot)
        for path, vector in scales.inputs.items():
            self._table(self._inputs, path, is_input=True)[slot] = vector.to(self._device)
        for path, vector in scales.outputs.items():
            self._table(self._outputs, path, is_input=False)[slot] = vector.to(self._device)
        self._targets[slot] = scales

    def _reset(self, slot: int) -> None:
        previous = self._targets.pop(slot, None)
        if previous is not None:
            for path in previous.inputs:
                self._inputs[path][slot] = 1.0
            for path in previous.outputs:
                self._outputs[path][slot] = 1.0

    def _table(self, tables: dict[str, torch.Tensor], path: str, *, is_input: bool) -> torch.Tensor:
        table = tables.get(path)
        if table is None:
            spec = self._spec.linear_modules[path]
            width = spec.in_features if is_input else spec.out_features
            table = tables[path] = torch.ones(self._num_rows, width, device=self._device)
            self._hook(path, table, is_input=is_input)
        return table

    def _hook(self, path: str, table: torch.Tensor, *, is_input: bool) -> None:
        module = self._modules[path]

        def on_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self.in_use:
                return None
            return (self._scale(args[0], table, in_place=False), *args[1:])

        def on_output(_module: nn.Module, _args: Any, out: torch.Tensor) -> None:
            if self.in_use:
                self._scale(out, table, in_place=True)

        if is_input:
            module.register_forward_pre_hook(on_input)
        else:
            module.register_forward_hook(on_output)

    @property
    def in_use(self) -> bool:
        """Whether a token of this step uses scales."""
        return self._span is not None

    @property
    def slots(self) -> torch.Tensor:
        """(T,) int64: the row of the tables that each token of a step in use has."""
        return self._slots

    @property
    def num_tables(self) -> int:
        """Tables so far; there is never one less, and none is ever another."""
        return len(self._inputs) + len(self._outputs)

    def input_table(self, path: str) -> torch.Tensor | None:
        """(num_slots + 1, in_features) float32 of a module, if an adapter ever targeted its input."""
        return self._inputs.get(path)

    def output_table(self, path: str) -> torch.Tensor | None:
        """(num_slots + 1, out_features) float32 of a module, if one ever targeted its output."""
        return self._outputs.get(path)

    def scaled_input(self, path: str, x: torch.Tensor, *, in_place: bool) -> torch.Tensor:
        """x (..., T, in_features) of a module as its hook would make it: x itself, or a copy."""
        table = self._inputs.get(path)
        if table is None or not self.in_use:
            return x
        return self._scale(x, table, in_place=in_place)

    def scale_output(self, path: str, out: torch.Tensor) -> None:
        """What a module's hook would do to its output (..., T, out_features), in place."""
        table = self._outputs.get(path)
        if table is not None and self.in_use:
            self._scale(out, table, in_place=True)

    def _scale(self, x: torch.Tensor, table: torch.Tensor, *, in_place: bool) -> torch.Tensor:
        """x (..., T, width), or a copy, since others may read an input too."""
        # Multiply in float32 and round once, as PEFT's float32 vectors do on a bf16 base.
        if self._fast and x.stride(-1) == 1:
            return scale_rows(x, table, self._slots, in_place=in_place)
        scaled = x if in_place else x.clone()
        part = scaled[..., self._span, :]
        part.copy_(part * table[self._rows])
        return scaled
