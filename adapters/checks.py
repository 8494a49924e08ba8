"""Checkpoint checks shared by all methods.

Works on config fields and safetensors header entries, so nothing is allocated. Independent of methods,
files and base models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from adapters import key_names
from adapters.errors import MethodUnsupported, NonFinite, TensorMismatch
from adapters.field_errors import close_to
from adapters.method import PeftConfig, TensorInfo
from adapters.peft_names import letters
from adapters.peft_types import TaskType

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")
SERVED_TASK = "CAUSAL_LM"
# What people write for a task: letters and digits -> PEFT's name.
_TASK_ALIASES = {
    "causal": "CAUSAL_LM",
    "causallanguagemodeling": "CAUSAL_LM",
    "causallanguagemodelling": "CAUSAL_LM",
    "clm": "CAUSAL_LM",
    "lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "sequenceclassification": "SEQ_CLS",
    "textclassification": "SEQ_CLS",
    "textgeneration": "CAUSAL_LM",
    "tokenclassification": "TOKEN_CLS",
}
NAMES_SHOWN = 3
CHARACTERS_SHOWN = 120


def check_task_type(config: PeftConfig) -> None:
    """Check that the task type is causal language modelling or unset.

    Raises:
        MethodUnsupported: any other `task_type`.
    """
    task = config.task_type
    if task is None or task == SERVED_TASK:
        return
    if task not in list(TaskType):
        raise _no_task(task)
    if task == "SEQ_2_SEQ_LM":
        reason = "it was trained on an encoder-decoder, and only decoder-only bases are served"
    else:
        reason = "it needs an output head of its own, and only text generation is served"
    raise MethodUnsupported(
        f"task_type {quoted(task)} is not served: {reason} (expected {SERVED_TASK!r})",
        field="task_type",
        expected=SERVED_TASK,
        came=quoted(task),
    )


def _no_task(task: str) -> MethodUnsupported:
    name = task.rpartition("TaskType.")[2]
    meant = _TASK_ALIASES.get(letters(name[:60])) or close_to(name, list(TaskType))
    hint = f"did you mean {meant}?" if meant else f"expected {SERVED_TASK!r}"
    return MethodUnsupported(
        f"task_type {quoted(task)} is no task of PEFT, which does not load it either; {hint}",
        field="task_type",
        expected=SERVED_TASK,
        came=quoted(task),
    )


def check_modules_to_save(modules: list[str] | None) -> None:
    """Refuse fully retrained modules: the base is shared and frozen.

    Raises:
        MethodUnsupported: `modules` is not empty.
    """
    if modules:
        raise MethodUnsupported(
            f"modules_to_save ({some_of(modules)}) is not served: it replaces whole modules of the base, "
            "which every adapter shares; expected null or an empty list",
            field="modules_to_save",
            expected="null or []",
            came=some_of(modules),
        )


def check_dtypes(tensors: Mapping[str, TensorInfo]) -> None:
    """Check that every tensor has a floating-point dtype.

    Raises:
        TensorMismatch: a tensor of another dtype.
    """
    for name, info in tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            expected = "one of " + ", ".join(FLOAT_DTYPES)
            raise TensorMismatch(
                f"tensor {quoted(name)} has dtype {info.dtype}, expected {expected}",
                field=name,
                expected=expected,
                came=info.dtype,
            )


def check_shape(name: str, info: TensorInfo, want: tuple[int, ...], why: str) -> None:
    """Check the shape of one tensor; `why` explains the shape in the error.

    Raises:
        TensorMismatch: another shape.
    """
    if info.shape != want:
        raise TensorMismatch(
            f"tensor {quoted(name)} has shape {info.shape}, expected {want} ({why}){sharded(info)}",
            field=name,
            expected=str(want),
            came=str(info.shape),
        )


def sharded(info: TensorInfo) -> str:
    """What to do about a tensor without elements, for the end of a message; empty for others."""
    if 0 not in info.shape:
        return ""
    return (
        "; it is empty, as DeepSpeed's ZeRO-3 leaves weights that it has sharded: gather them when saving "
        "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
    )


def check_names(tensors: Mapping[str, TensorInfo], wanted: Iterable[str]) -> None:
    """Check that the tensor names are exactly `wanted`.

    Raises:
        TensorMismatch: a name is missing or left over.
    """
    names = set(wanted)
    missing = sorted(names - set(tensors))
    left_over = sorted(set(tensors) - names)
    hint = key_names.explain(tensors, names.__contains__) if left_over else None
    if hint is None and len(left_over) == len(missing) == len(tensors) == 1:
        hint = key_names.rename_to(missing[0], left_over[0])
    then = f"; {hint}" if hint else ""
    if missing:
        came = some_of(left_over) if left_over else "no such tensor"
        raise TensorMismatch(
            f"the checkpoint lacks {some_of(missing)} (came: {came}){then}",
            field=missing[0],
            expected=some_of(missing),
            came=came,
        )
    if left_over:
        raise TensorMismatch(
            f"the checkpoint holds {some_of(left_over)}, which binds to nothing "
            f"(expected only {some_of(sorted(names))}){then}",
            field=left_over[0],
            expected=some_of(sorted(names)),
            came=some_of(left_over),
        )


def some_of(names: list[str]) -> str:
    """The first few names, quoted, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:NAMES_SHOWN])
    more = len(names) - NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def quoted(name: str) -> str:
    """The untrusted name in quotes, truncated if long."""
    return repr(name if len(name) <= CHARACTERS_SHOWN else name[:CHARACTERS_SHOWN] + "...")


def to_float32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy on the CPU.

    Raises:
        NonFinite: NaN or infinity, also where a float64 value does not fit into float32.
    """
    import torch

    values = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(
            f"tensor {quoted(name)} holds NaN or infinity (as float32); expected finite values",
            field=name,
            expected="finite float32 values",
            came="NaN or infinity",
        )
    return values
