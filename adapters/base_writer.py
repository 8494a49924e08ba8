"""Writes a copy of a Hugging Face model directory with some of the weights changed.

Weights are streamed one tensor at a time, so peak memory is that of the largest tensor. Tensor names,
their order and the file layout are preserved. The new directory is synced, then appears by a single
rename. Independent of adapters: the change is passed in as a function.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import safetensors
import torch

from adapters import synced_files
from adapters.base_files import INDEX_FILE, WEIGHTS_FILE
from adapters.checkpoint.folder import shorten
from adapters.errors import MergeInvalid

CONFIG_FILE = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Files copied beside the weights: configs, tokenizer, chat templates, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_COPIED_FOLDERS = ("additional_chat_templates",)
# Our own files record the identity and origin of the base, which a changed copy no longer has.
_LEFT_OUT = ("*.safetensors.index.json", "*.bin.index.json", "graftwork_*.json", "adapter_*.json")
_ALIGNMENT = 8
# Bytes per element, by safetensors dtype name.
_NUM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_FLOATS = {"F64", "F32", "F16", "BF16"}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Change: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, over all of a model's weight files. Reads headers only.

    Raises:
        MergeInvalid: a file is missing or not safetensors.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                found[name] = tuple(tensors.get_slice(name).get_shape())
    return found


def write_base(
    base_dir: Path,
    files: Sequence[Path],
    out: Path,
    change: Change,
    *,
    dtype: str | None = None,
    notes: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a changed copy of a model directory.

    Args:
        base_dir: the model; its configs, tokenizer and templates are copied, code is not.
        files: its weight files.
        out: must not exist; created atomically.
        change: maps a name and tensor of the base to the tensor to write, of the same shape and dtype.
        dtype: dtype that all floating-point weights are cast to before the change; None keeps the
            stored dtypes.
        notes: additional JSON files from the caller, by name.

    Raises:
        MergeInvalid: `out` exists, or a weight file is not safetensors.
        StorageFull: the disk is full; nothing is left behind.
    """
    with synced_files.full_disk_is_storage_full("the base"), _appearing(out) as made:
        num_bytes = 0
        for file in files:
            num_bytes += _rewrite(
                file, made / file.name, change, None if dtype is None else DTYPES[dtype]
            )
        _copy_company(base_dir, made, dtype)
        if [file.name for file in files] != [WEIGHTS_FILE]:
            _write_index(base_dir, made, num_bytes)
        for name, note in notes.items():
            _write_json(made / name, note)


def require_absent(out: Path) -> None:
    """Refuse an output path that exists.

    Raises:
        MergeInvalid: the path exists, even as a dangling link.
    """
    if out.exists() or out.is_symlink():
        raise MergeInvalid(
            f"{out} exists; a base is written to a place of its own",
            field="out",
            expected="a directory that does not exist",
            came=str(out),
        )


# --- weights ---------------------------------------------------------------------------------


def _rewrite(source: Path, target: Path, change: Change, dtype: torch.dtype | None) -> int:
    """Copy one safetensors file with its tensors changed. Returns its tensor bytes."""
    with _opened(source) as tensors, target.open("xb") as file:
        names = list(tensors.offset_keys())
        header, num_bytes = _header(tensors, names, dtype)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors.get_tensor(name)
            if dtype is not None and _is_converted(tensors.get_slice(name).get_dtype()):
                tensor = tensor.to(dtype)
            _write(file, change(name, tensor))
        file.flush()
        synced_files.sync(target)
    return num_bytes


def _header(
    tensors: Any, names: Sequence[str], dtype: torch.dtype | None
) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {"__metadata__": tensors.metadata() or {"format": "pt"}}
    end = 0
    for name in names:
        part = tensors.get_slice(name)
        shape, stored = part.get_shape(), part.get_dtype()
        if dtype is not None and _is_converted(stored):
            stored = _NAMES[dtype]
        if stored not in _NUM_BYTES:
            raise MergeInvalid(
                f"{name} is stored as {stored}, which cannot be copied; expected plain numbers",
                field=name,
                expected=", ".join(_NUM_BYTES),
                came=stored,
            )
        begin, end = end, end + math.prod(shape) * _NUM_BYTES[stored]
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, end]}
    return header, end


def _is_converted(stored: str) -> bool:
    return stored in _FLOATS


def _write(file: BinaryIO, tensor: torch.Tensor) -> None:
    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise MergeInvalid(
            f"{path} is not a safetensors file that can be read: {shorten(error)}",
            field=path.name,
            expected="a safetensors file",
            came=shorten(error),
        ) from error


# --- the directory ---------------------------------------------------------------------------


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`: renamed to `out` on success, removed on failure."""
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp makes it private
        for folder in (*(path for path in made.iterdir() if path.is_dir()), made):
            synced_files.sync(folder)
        require_absent(out)
        made.rename(out)
        synced_files.sync(out.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _copy_company(base_dir: Path, made: Path, dtype: str | None) -> None:
    """Copy configs, tokenizer and templates; never code, and no file that identifies the base."""
    for source in sorted({path for mask in _COPIED for path in base_dir.glob(mask)}):
        if not source.is_file() or any(source.match(mask) for mask in _LEFT_OUT):
            continue
        if source.name == CONFIG_FILE and dtype is not None:
            config = json.loads(source.read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            _write_json(made / CONFIG_FILE, {**config, "dtype": dtype})
        else:
            synced_files.copy_file(source, made / source.name)
    for name in _COPIED_FOLDERS:
        if (base_dir / name).is_dir():
            (made / name).mkdir()
            for source in sorted((base_dir / name).glob("*.jinja")):
                synced_files.copy_file(source, made / name / source.name)


def _write_index(base_dir: Path, made: Path, num_bytes: int) -> None:
    index = json.loads((base_dir / INDEX_FILE).read_text(encoding="utf-8"))
    metadata = {**(index.get("metadata") or {}), "total_size": num_bytes}
    _write_json(made / INDEX_FILE, {"metadata": metadata, "weight_map": index["weight_map"]})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    synced_files.write_file(path, (json.dumps(value, indent=2) + "\n").encode())
