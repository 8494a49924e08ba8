"""Weighted sums of adapters: several PEFT checkpoints in, one PEFT checkpoint out.

    linear   sum w * x                of every tensor; a module that an IA3 adapter lacks counts 0
    delta    1 + sum w * (l - 1)      of IA3's vectors; a module that an adapter lacks counts 1

`linear` of IA3 is PEFT's `add_weighted_adapter` to the last bit: zeros, and adapter after adapter one
multiplication and one addition. Rows of virtual tokens add up the same way; what is stored of a
P-tuning encoder or a prefix projection is its output, so outputs are added, and the result has no such
network. Independent of the registry, the base and HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from adapters.checkpoint.folder import (
    CONFIG_FILE,
    TENSORS_FILE,
    canonical_config,
    load_tensors,
    read_config,
    read_header,
)
from adapters.checks import quoted, some_of
from adapters.errors import CombineInvalid

if TYPE_CHECKING:
    import torch

    _Tensors = Mapping[str, torch.Tensor]
else:  # an idle server does not import torch
    _Tensors = Mapping

CombinationType = Literal["linear", "delta"]
Parent: TypeAlias = tuple[Mapping[str, Any], _Tensors]

MAX_ADAPTERS = 64

# Initialisation fields, which are meaningless for a sum.
_FORGOTTEN: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {"prefix_projection": False},
    "PROMPT_TUNING": {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    },
}
_COMPLETED = ("task_type", "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")


def combine(
    adapters: Sequence[Parent],
    weights: Sequence[float],
    combination_type: CombinationType = "linear",
    *,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Compute a weighted sum of checkpoints of one method.

    Args:
        adapters: (config, tensors) each, as `stored` or `read_config` and `load_tensors` give them.
            An adapter may occur several times.
        weights: one per adapter, of any sign.
        combination_type: see the module docstring; "delta" is for IA3.
        dtype: of the sum; None is float32. PEFT adds in that of its base: it gives the same bits on
            a base of this dtype, and rounds after every adapter on a base of bfloat16.

    Returns:
        Config and tensors of the sum, as PEFT would save them; the config is the first adapter's
        with what the sum changes.

    Raises:
        CombineInvalid: nothing to add, other than one finite weight an adapter, different methods,
            lengths, shapes or sides of a module, or a sum that is not finite.
        MethodUnsupported: a config of a method that is not served.
    """
    _check_counts(adapters, weights, combination_type)
    peft_type = _one_method(adapters)
    if combination_type == "delta" and peft_type != "IA3":
        raise CombineInvalid(
            f"combination_type 'delta' adds distances from 1, which only IA3's vectors have; "
            f"{peft_type} adds linearly",
            field="combination_type",
            expected="linear",
            came="delta",
        )
    if peft_type == "IA3":
        adapters = [(config, _PlainNames(tensors)) for config, tensors in adapters]
        config = _ia3_config(adapters)
    else:
        _check_same_names(adapters)
        config = _first_config(adapters) | _FORGOTTEN.get(peft_type, {})
    names = dict.fromkeys(name for _, tensors in adapters for name in tensors)
    total = {name: _sum(name, adapters, weights, combination_type, dtype) for name in names}
    return canonical_config(config), total


class Stored(_Tensors):
    """The tensors of a checkpoint file, each read on access and not cached.

    Args:
        path: the file; its header is checked here.

    Raises:
        CheckpointError: see `read_header`; from a look-up, see `load_tensors`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = tuple(read_header(path))

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return load_tensors(self._path, [name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _PlainNames(_Tensors):
    """IA3's tensors by the names that `save_pretrained` gives, without the adapter's name."""

    def __init__(self, tensors: _Tensors) -> None:
        from adapters.methods.ia3 import plain_name

        self._tensors = tensors
        self._names = {plain_name(name): name for name in tensors}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored(directory: Path) -> Parent:
    """Config and tensors of a checkpoint folder, for `combine`. Reads no tensor yet.

    Raises:
        CheckpointError: see `read_config` and `read_header`.
    """
    return read_config(directory / CONFIG_FILE), Stored(directory / TENSORS_FILE)


# --- what may be added -----------------------------------------------------------------------


def _check_counts(
    adapters: Sequence[Parent], weights: Sequence[float], combination_type: str
) -> None:
    if combination_type not in ("linear", "delta"):
        raise CombineInvalid(
            f"combination_type {quoted(combination_type)} is not known",
            field="combination_type",
            expected="linear or delta",
            came=quoted(combination_type),
        )
    if not 1 <= len(adapters) <= MAX_ADAPTERS:
        raise CombineInvalid(
            f"expected 1 to {MAX_ADAPTERS} adapters, came {len(adapters)}",
            field="adapters",
            expected=f"1 to {MAX_ADAPTERS} adapters",
            came=str(len(adapters)),
        )
    if len(weights) != len(adapters):
        raise CombineInvalid(
            f"expected a weight for each of {len(adapters)} adapters, came {len(weights)}",
            field="weights",
            expected=f"{len(adapters)} numbers",
            came=str(len(weights)),
        )
    for number, weight in enumerate(weights, 1):
        if not math.isfinite(weight):
            raise CombineInvalid(
                f"weight {number} is {weight}, expected a finite number",
                field="weights",
                expected="finite numbers",
                came=str(weight),
            )


def _one_method(adapters: Sequence[Parent]) -> str:
    from adapters.methods import method_of

    kinds = [method_of(config).peft_type for config, _ in adapters]
    for number, kind in enumerate(kinds, 1):
        if kind != kinds[0]:
            raise CombineInvalid(
                f"adapter 1 is {kinds[0]} and adapter {number} is {kind}; adapters of one method "
                "add up",
                field="adapters",
                expected=kinds[0],
                came=kind,
            )
    return kinds[0]


def _check_same_names(adapters: Sequence[Parent]) -> None:
    """Check that all adapters of virtual tokens have the same tensors."""
    first = set(adapters[0][1])
    for number, (_, tensors) in enumerate(adapters, 1):
        if differ := sorted(first ^ set(tensors)):
            raise CombineInvalid(
                f"adapters 1 and {number} differ in their tensors: {some_of(differ)}",
                field="adapters",
                expected=some_of(sorted(first)),
                came=some_of(sorted(tensors)),
            )


# --- the sum ---------------------------------------------------------------------------------


def _sum(
    name: str,
    adapters: Sequence[Parent],
    weights: Sequence[float],
    combination_type: CombinationType,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """One tensor of the result; an adapter without it contributes nothing, as if it were 0 (delta: 1)."""
    import torch

    numbers = [number for number, (_, tensors) in enumerate(adapters) if name in tensors]
    start = 1.0 if combination_type == "delta" else 0.0
    total = torch.full(adapters[numbers[0]][1][name].shape, start, dtype=dtype or torch.float32)
    for number in numbers:
        # PEFT holds an adapter's own tensors in float32, whatever the base's dtype is.
        tensor = adapters[number][1][name].detach().to(device="cpu", dtype=torch.float32)
        _check_shape(name, tensor, total, number + 1, numbers[0] + 1)
        distance = tensor - 1.0 if combination_type == "delta" else tensor
        total += distance * weights[number]
    if not bool(torch.isfinite(total).all()):
        raise CombineInvalid(
            f"the sum of {quoted(name)} holds NaN or infinity; the weights are too large",
            field="weights",
            expected="weights whose sum stays finite",
            came=", ".join(str(weight) for weight in weights[:8]),
        )
    return total


def _check_shape(
    name: str, tensor: torch.Tensor, total: torch.Tensor, number: int, first: int
) -> None:
    from adapters.methods.ia3 import SUFFIX

    if tensor.shape == total.shape:
        return
    came, want = tuple(tensor.shape), tuple(total.shape)
    if name.endswith(SUFFIX):
        what = f"{quoted(name)} has another shape or scales another side"
    elif len(came) == 2 and len(want) == 2 and came[1] == want[1]:
        what = "only adapters with as many virtual tokens add up"
    else:
        what = f"{quoted(name)} has another shape"
    raise CombineInvalid(
        f"{what}: {want} in adapter {first}, {came} in adapter {number}",
        field="adapters",
        expected=str(want),
        came=str(came),
    )


# --- the config ------------------------------------------------------------------------------


def _first_config(adapters: Sequence[Parent]) -> dict[str, Any]:
    """The first adapter's config, with unset fields taken from the others."""
    config: dict[str, Any] = {**adapters[0][0], "inference_mode": True}
    for other, _ in adapters[1:]:
        for field in _COMPLETED:
            if config.get(field) is None and other.get(field) is not None:
                config[field] = other[field]
    return config


def _ia3_config(adapters: Sequence[Parent]) -> dict[str, Any]:
    """Names of targets as PEFT unites them where they say which modules the result scales, and on
    which side; else full module paths, since the binding is by tensor."""
    sides = _sides(adapters)
    config = _first_config(adapters)
    targets, feedforward = _united(adapters, sides)
    config |= {
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "exclude_modules": None,
        "fan_in_fan_out": any(parent.get("fan_in_fan_out") for parent, _ in adapters),
    }
    return config


def _sides(adapters: Sequence[Parent]) -> dict[str, bool]:
    """Module path -> whether its input is scaled, as every adapter that has it must agree."""
    from adapters.methods.ia3 import PREFIX, SUFFIX, ends_with_any

    sides: dict[str, bool] = {}
    for number, (config, tensors) in enumerate(adapters, 1):
        listed = config.get("feedforward_modules")
        for name in tensors:
            path = name.removeprefix(PREFIX).removesuffix(SUFFIX)
            shape = tuple(tensors[name].shape)
            scales_input = len(shape) == 2 and shape[0] == 1
            if shape == (1, 1):  # a module of width 1: only the config can say
                scales_input = isinstance(listed, list) and ends_with_any(path, frozenset(listed))
            if sides.setdefault(path, scales_input) != scales_input:
                raise CombineInvalid(
                    f"feedforward_modules: adapter {number} scales "
                    f"{'the input' if scales_input else 'the output'} of {quoted(path)}, an adapter "
                    "before it the other side; only scales of the same side add up",
                    field="adapters",
                    expected="the output" if scales_input else "the input",
                    came="the input" if scales_input else "the output",
                )
    return sides


def _united(adapters: Sequence[Parent], sides: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    from adapters.methods.ia3 import dotted_endings, ends_with_any

    paths = sorted(sides), sorted(path for path, scales_input in sides.items() if scales_input)
    targets: set[str] = set()
    feedforward: set[str] = set()
    for config, _ in adapters:
        named, inputs = config.get("target_modules"), config.get("feedforward_modules")
        if not isinstance(named, list) or not isinstance(inputs, list):
            return paths
        if config.get("exclude_modules"):
            return paths  # a module that one adapter omits, another may scale
        targets |= set(named)
        feedforward |= set(inputs)
    if not feedforward <= targets:
        return paths  # PEFT refuses this
    for path, scales_input in sides.items():
        is_named = not targets.isdisjoint(dotted_endings(path))
        if not is_named or ends_with_any(path, feedforward) != scales_input:
            return paths
    return sorted(targets), sorted(feedforward)
