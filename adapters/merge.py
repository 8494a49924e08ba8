"""Merges an IA3 adapter into its base, as a stand-alone Hugging Face directory.

    weight (out, in)   rows times l where the output is scaled, columns where the input is
    bias (out,)        times l where the output is scaled

Source: peft/tuners/ia3/layer.py, `merge`: vectors are float32, so the product of a narrower weight is
computed in float32 and rounded once. This file determines the factors; `adapters.base_writer` writes the
result. Independent of the registry.
"""

from __future__ import annotations

import functools
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from adapters.base_files import weight_files
from adapters.base_model import BaseModelSpec
from adapters.base_writer import DTYPES, require_absent, tensor_shapes, write_base
from adapters.checkpoint.archive import stage_upload
from adapters.checkpoint.folder import (
    CONFIG_FILE,
    check_checkpoint,
    load_serving_form,
    read_config,
    shorten,
)
from adapters.checks import some_of
from adapters.errors import MergeInvalid, NonFinite
from adapters.methods import method_of
from adapters.parts import ActivationScales

MERGE_FILE = "graftwork_merge.json"

# Maps a module path to its name in the weight files.
_Rename: TypeAlias = Callable[[str], str]


@dataclass(frozen=True)
class Merged:
    """What `merge_into_base` wrote.

    Attributes:
        directory: the new base.
        num_modules: linear modules that were scaled.
        num_bytes: all files together.
        files: their names, sorted.
    """

    directory: Path
    num_modules: int
    num_bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """The factor of a tensor of the base.

    Attributes:
        factor: float32, of a shape that broadcasts against the tensor's.
        shape: required shape of the tensor.
    """

    factor: torch.Tensor
    shape: tuple[int, ...]


def merge_into_base(
    base_dir: Path,
    adapter_dir: Path,
    out: Path,
    *,
    safe_merge: bool,
    base: BaseModelSpec,
    dtype: str | None = None,
) -> Merged:
    """Write a base with an IA3 adapter multiplied into its weights.

    Args:
        base_dir: the base, a Hugging Face directory with safetensors weights.
        adapter_dir: a PEFT folder; what else lies in it is not read.
        out: must not exist; created atomically.
        safe_merge: refuse weights that are not finite afterwards.
        base: the spec of `base_dir`.
        dtype: "float32", "bfloat16" or "float16" for all weights, changed before they are
            multiplied, as where PEFT loads the base in that dtype; None leaves each as it is stored.

    Raises:
        MergeInvalid: not IA3, `out` is taken, another dtype, or the base's files do not hold a
            module that the adapter scales.
        CheckpointError: the adapter does not fit the base.
        NonFinite: `safe_merge`, and a weight is NaN or infinite.
        StorageFull: the disk is full; nothing is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise MergeInvalid(
            f"dtype {shorten(dtype)!r} is not known, expected one of {', '.join(DTYPES)}",
            field="dtype",
            expected=", ".join(DTYPES),
            came=shorten(dtype),
        )
    require_absent(out)
    scales, digest = _read_adapter(adapter_dir, base)
    files = weight_files(base_dir)
    changes = _locate(_changes(scales, base), tensor_shapes(files), base_dir)
    num_modules = len(scales.inputs) + len(scales.outputs)
    origin = {
        "base_digest": base.digest,
        "adapter_digest": digest,
        "num_modules": num_modules,
        "dtype": dtype,
        "safe_merge": safe_merge,
    }

    def merged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        change = changes.get(name)
        if change is None:
            return tensor
        product = torch.mul(tensor, change.factor).to(tensor.dtype)
        if safe_merge and not bool(torch.isfinite(product).all()):
            raise NonFinite(
                f"{name} holds NaN or infinity after the merge; nothing was written",
                field=name,
                expected="finite weights",
                came="NaN or infinity",
            )
        return product

    write_base(base_dir, files, out, merged, dtype=dtype, notes={MERGE_FILE: origin})
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return Merged(
        directory=out,
        num_modules=num_modules,
        num_bytes=sum(path.stat().st_size for path in paths),
        files=tuple(str(path.relative_to(out)) for path in paths),
    )


def _read_adapter(directory: Path, base: BaseModelSpec) -> tuple[ActivationScales, str]:
    """The scales of a PEFT folder, and its digest."""
    with tempfile.TemporaryDirectory(prefix="graftwork-") as work:
        staged = Path(work)
        files = sorted(path for path in directory.iterdir() if path.is_file())
        stage_upload([(path.name, path) for path in files], staged)
        peft_type = method_of(read_config(staged / CONFIG_FILE)).peft_type
        if peft_type != "IA3":
            raise MergeInvalid(
                f"only IA3 changes weights; {peft_type} stands before the prompt and cannot be "
                "merged into a base",
                field="peft_type",
                expected="IA3",
                came=peft_type,
            )
        checked = check_checkpoint(staged, base)
        form = load_serving_form(staged, base)
    if not isinstance(form, ActivationScales):
        raise TypeError(f"IA3 is served as {type(form).__name__}")
    return form, checked.digest


def _changes(scales: ActivationScales, base: BaseModelSpec) -> dict[str, dict[str, _Change]]:
    """Module path -> parameter name -> change; "bias" too where the output is scaled."""
    found: dict[str, dict[str, _Change]] = {}
    for is_input, vectors in ((True, scales.inputs), (False, scales.outputs)):
        for path, vector in vectors.items():
            spec = base.linear_modules[path]
            is_transposed = spec.kind == "conv1d"  # its weight is stored (in, out)
            shape = (spec.out_features, spec.in_features)
            factor = vector.unsqueeze(0 if is_input != is_transposed else 1)
            found[path] = {"weight": _Change(factor, shape[::-1] if is_transposed else shape)}
            if not is_input:
                found[path]["bias"] = _Change(vector, (spec.out_features,))
    return found


def _locate(
    changes: Mapping[str, Mapping[str, _Change]],
    shapes: Mapping[str, tuple[int, ...]],
    base_dir: Path,
) -> dict[str, _Change]:
    """Tensor name in the files -> its change.

    The files name tensors as the model does, or without the model's own prefix ("transformer." of
    GPT-2), or with a further one; all of them alike.
    """
    paths = list(changes)
    for rename in _renamings(paths[0], shapes):
        if all(f"{rename(path)}.weight" in shapes for path in paths):
            break
    else:
        missing = [path for path in paths if f"{path}.weight" not in shapes]
        raise MergeInvalid(
            f"the weight files of {base_dir} hold nothing for {some_of(missing)}, which the adapter "
            "scales: they name or group weights in another way than the model does",
            field="base",
            expected=f"{missing[0]}.weight",
            came=some_of(sorted(shapes)),
        )
    found: dict[str, _Change] = {}
    for path, parameters in changes.items():
        for parameter, change in parameters.items():
            name = f"{rename(path)}.{parameter}"
            if name not in shapes:
                continue  # a module without a bias
            if shapes[name] != change.shape:
                raise MergeInvalid(
                    f"{name} has shape {shapes[name]} in the weight files of {base_dir}, "
                    f"the model's is {change.shape}",
                    field=name,
                    expected=str(change.shape),
                    came=str(shapes[name]),
                )
            found[name] = change
    return found


def _renamings(path: str, names: Mapping[str, object]) -> Iterator[_Rename]:
    """The ways in which files may name modules, for a path that stands for all of them."""
    for num_dropped in range(path.count(".")):
        yield functools.partial(_without_parts, num_dropped)
    ending = f".{path}.weight"
    for name in names:
        if name.endswith(ending):
            yield functools.partial(operator.add, name[: -len(ending)] + ".")


def _without_parts(count: int, path: str) -> str:
    return ".".join(path.split(".")[count:])
