"""An untrusted checkpoint folder: `adapter_config.json` and `adapter_model.safetensors`.

Reads and validates the two files, writes them atomically, and computes the digest of their content. The
safetensors header is parsed here and checked against the file's length before any tensor is allocated;
only then is the file passed to the safetensors library. Pickles are never opened.

    bytes on disk -> read_config, read_header -> the method's own check -> load_tensors

torch and the methods are imported with the first checkpoint that is read, so an idle server does not
load them. Independent of the methods (`adapters.methods` finds the one that a config names), the
registry and HTTP.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import safetensors

from adapters import foreign_configs, synced_files
from adapters.base_model import BaseModelSpec
from adapters.checkpoint.config import ReadConfig, read_peft_config
from adapters.checkpoint.limits import DEFAULT_LIMITS, CheckpointLimits
from adapters.errors import (
    AdapterCorrupt,
    CheckpointTooLarge,
    ConfigInvalid,
    FileSetInvalid,
    HeaderInvalid,
    NonFinite,
    TensorMismatch,
    UnsupportedFile,
)
from adapters.method import AdapterFacts, AdapterMethod, PeftConfig, TensorInfo
from adapters.parts import ServingForm
from adapters.strict_json import StrictJsonError, parse_object

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
FILES = frozenset({CONFIG_FILE, TENSORS_FILE})

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

# Bytes of one element. Weights are floats: every other dtype is refused by name.
_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# PEFT stores these as Python sets and writes them in an order that varies between runs.
_SET_FIELDS = ("target_modules", "exclude_modules", "feedforward_modules")
_LENGTH_BYTES = 8  # the header's length, little endian, opens the file
_SHELL_SAFE = re.compile(r"[A-Za-z0-9._-]{1,80}")  # untrusted names are shown in a command line
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_HEADER_DEPTH = 3  # object of entries, entry, shape or offsets


@dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint that passed every check against one base.

    Attributes:
        method: the method's name in URLs, such as "prefix_tuning".
        peft_type: PEFT's name for it, such as "PREFIX_TUNING".
        config: the parsed config of that method.
        facts: facts needed for serving.
        digest: see `checkpoint_digest`.
        num_bytes: both files together.
        base_name: the config's `base_model_name_or_path`, not checked here.
        warnings: sentences for the uploader.
    """

    method: str
    peft_type: str
    config: PeftConfig
    facts: AdapterFacts
    digest: str
    num_bytes: int
    base_name: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the header and the half-open byte range [begin, end) of its data."""

    info: TensorInfo
    begin: int
    end: int


@dataclass(frozen=True)
class _Header:
    """All entries by name; `data_start` is the file offset that ranges count from."""

    entries: dict[str, _Entry]
    data_start: int


# --- reading ------------------------------------------------------------------------------


def read_header(path: Path, limits: CheckpointLimits = DEFAULT_LIMITS) -> dict[str, TensorInfo]:
    """Read and check a safetensors header; reads no tensor data and allocates none.

    Accepts exactly: a length that fits the file, a JSON object, float dtypes (F64, F32, F16,
    BF16), bounded shapes, byte ranges that follow one another without gap or overlap from the
    end of the header to the end of the file, and an optional `__metadata__` of strings.

    Raises:
        CheckpointTooLarge: file, header, tensor count, rank or a dimension is over its limit.
        UnsupportedFile: not safetensors at all, such as a pickle or a Git LFS pointer.
        HeaderInvalid: the header is malformed or does not fit the file.
        TensorMismatch: a tensor of a dtype that holds no weights.
    """
    with _open_regular(path, limits.file_bytes) as (file, size):
        header = _parse_header(file, size, path.name, limits)
    return {name: entry.info for name, entry in header.entries.items()}


def read_config(path: Path, limits: CheckpointLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """Read `adapter_config.json` as a plain object; the method validates its fields.

    A byte order mark of UTF-8 is skipped.

    Raises:
        CheckpointTooLarge: over `limits.config_bytes`.
        ConfigInvalid: see `adapters.strict_json.parse_object`.
    """
    with _open_regular(path, limits.config_bytes) as (file, size):
        data = file.read(size).removeprefix(codecs.BOM_UTF8)
    try:
        return parse_object(data, limits.config_depth)
    except StrictJsonError as error:
        hint = foreign_configs.what_the_json_lacks(data)
        raise ConfigInvalid(
            f"{path.name} cannot be read: {error}{'; ' if hint else ''}{hint or ''}",
            field=path.name,
            expected="one JSON object in UTF-8",
            came=str(error),
        ) from error


def load_tensors(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Load tensors, in their own dtype, on the CPU, in memory of their own.

    The header must have passed `read_header`.

    Raises:
        HeaderInvalid: the safetensors library rejects the file, or a name is not in it.
        NonFinite: NaN, infinity, or a float64 that is infinite as float32.
    """
    loaded: dict[str, torch.Tensor] = {}
    for name, tensor in _iterate_tensors(path, names):
        # The library memory-maps the file; a copy is safe from later truncation.
        loaded[name] = tensor.clone()
    return loaded


def checkpoint_digest(
    config: Mapping[str, Any], tensors: Path, limits: CheckpointLimits = DEFAULT_LIMITS
) -> str:
    """sha256 (hex) over the content of a checkpoint, in one canonical form.

    The config counts with sorted keys and sorted set-like lists (PEFT writes sets in an order
    that changes from run to run), the tensors by sorted name with dtype, shape and data; so two
    saves of one adapter agree, whatever order the files have. Nothing else is left out, not even
    `peft_version`: a stored adapter is downloaded by its digest, and a field outside the digest
    could come back with another upload's value. Header metadata is not content.

    Args:
        config: the raw object, as `read_config` gives it.
        tensors: a safetensors file.
        limits: as for `read_header`, which this repeats.
    """
    with _open_regular(tensors, limits.file_bytes) as (file, size):
        header = _parse_header(file, size, tensors.name, limits)
        names = sorted(header.entries)
        listing = [[n, header.entries[n].info.dtype, header.entries[n].info.shape] for n in names]
        digest = hashlib.sha256(_canonical([canonical_config(config), listing]))
        for name in names:
            entry = header.entries[name]
            file.seek(header.data_start + entry.begin)
            for block in _blocks(file, entry.end - entry.begin):
                digest.update(block)
    return digest.hexdigest()


def digest_of(directory: Path, limits: CheckpointLimits = DEFAULT_LIMITS) -> str:
    """`checkpoint_digest` of a folder. Raises what reading its two files raises."""
    check_file_set(directory)
    return checkpoint_digest(
        read_config(directory / CONFIG_FILE, limits), directory / TENSORS_FILE, limits
    )


def canonical_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with sorted keys and sorted set-like lists."""
    ordered = {key: config[key] for key in sorted(config)}
    for key in _SET_FIELDS:
        value = ordered.get(key)
        if isinstance(value, (list, tuple, set, frozenset)) and all(
            isinstance(item, str) for item in value
        ):
            ordered[key] = sorted(value)
    return ordered


def check_checkpoint(
    directory: Path, base: BaseModelSpec, limits: CheckpointLimits = DEFAULT_LIMITS
) -> CheckedCheckpoint:
    """Check a folder against a base: files, config, header, method, then the values.

    Nothing is allocated for tensors before names, dtypes and shapes have all passed.

    Raises:
        CheckpointError: one of its kinds, see `adapters.errors`.
    """
    check_file_set(directory)
    raw, method, read, facts = _check_without_values(directory, base, limits, is_upload=True)
    config = read.config
    if facts.num_virtual_tokens > limits.virtual_tokens:
        raise CheckpointTooLarge(
            f"the adapter has {facts.num_virtual_tokens} virtual tokens, at most "
            f"{limits.virtual_tokens} {limits.virtual_tokens_words}",
            field="num_virtual_tokens",
            expected=f"at most {limits.virtual_tokens} virtual tokens",
            came=f"{facts.num_virtual_tokens} virtual tokens",
        )
    tensors = directory / TENSORS_FILE
    largest = _largest_served(base.dtype)
    for _ in _iterate_tensors(tensors, read_header(tensors, limits), largest):
        pass  # the iterator checks the values; one tensor at a time is in memory
    return CheckedCheckpoint(
        method=method.name,
        peft_type=method.peft_type,
        config=config,
        facts=facts,
        digest=checkpoint_digest(raw, tensors, limits),
        num_bytes=sum((directory / name).stat().st_size for name in FILES),
        base_name=config.base_model_name_or_path,
        warnings=(*read.warnings, *facts.warnings),
    )


def load_serving_form(
    directory: Path,
    base: BaseModelSpec,
    limits: CheckpointLimits = DEFAULT_LIMITS,
    *,
    digest: str | None = None,
) -> ServingForm:
    """Read a stored checkpoint for the engine's loader thread; the caller casts dtypes.

    Args:
        directory: a folder that passed `check_checkpoint` when it was published.
        base: the current base, which may differ from the one it was checked against.
        limits: as for `check_checkpoint`.
        digest: what the content must hash to; None skips the hash.

    Raises:
        AdapterCorrupt: the folder is missing or truncated, or (with `digest`) differs at all.
        CheckpointError: the checkpoint does not fit this base.
    """
    path = directory / TENSORS_FILE
    try:
        check_file_set(directory)
        if digest is not None and digest_of(directory, limits) != digest:
            raise AdapterCorrupt(
                "the stored adapter no longer matches its digest", field="digest", expected=digest
            )
        _, method, read, _ = _check_without_values(directory, base, limits)
        tensors = load_tensors(path, read_header(path, limits))
    except (FileNotFoundError, FileSetInvalid, HeaderInvalid, ConfigInvalid) as error:
        raise AdapterCorrupt(f"the stored adapter cannot be read: {error}") from error
    form = method.serving_form(read.config, tensors, base)
    form.check(base)
    return form


def _check_without_values(
    directory: Path, base: BaseModelSpec, limits: CheckpointLimits, *, is_upload: bool = False
) -> tuple[dict[str, Any], AdapterMethod[Any], ReadConfig, AdapterFacts]:
    raw = read_config(directory / CONFIG_FILE, limits)
    from adapters.methods import method_of

    method = method_of(raw)
    read = read_peft_config(method, raw)
    if is_upload:  # what an earlier version took is still served
        read.config.check_peft_loads()
    facts = method.check(read.config, read_header(directory / TENSORS_FILE, limits), base)
    return raw, method, read, facts


# --- the file set -------------------------------------------------------------------------


def check_file_set(directory: Path) -> None:
    """Raise unless a folder holds the two files of a checkpoint and nothing else.

    Raises:
        UnsupportedFile: the weights are a pickle; the message gives the line that converts it.
        FileSetInvalid: a file is missing or left over.
    """
    names = {entry.name for entry in directory.iterdir()}
    if names != FILES:
        raise wrong_files(names)


def wrong_files(names: Iterable[str]) -> UnsupportedFile | FileSetInvalid:
    """The refusal for a set of file names that is not exactly a checkpoint's."""
    names = sorted(names)
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLE_SUFFIXES]
    known = foreign_configs.what_they_are(names)
    if pickles and TENSORS_FILE not in names:
        # A trainer leaves optimizer.pt and training_args.bin beside the weights.
        named = [name for name in pickles if Path(name).stem == "adapter_model"]
        if named or known is None:
            return pickle_refused((named or pickles)[0])
    came = ", ".join(shorten(name) for name in names[:12]) or "nothing"
    return FileSetInvalid(
        f"expected {CONFIG_FILE} and {TENSORS_FILE}; came: {came}{'; ' if known else ''}{known or ''}",
        field="files",
        expected=f"{CONFIG_FILE}, {TENSORS_FILE}",
        came=came,
    )


def pickle_refused(name: str, source: str = "adapter_model.bin") -> UnsupportedFile:
    """The refusal for a pickle, with the line that turns it into safetensors."""
    if Path(name).suffix.lower() in PICKLE_SUFFIXES and _SHELL_SAFE.fullmatch(Path(name).name):
        source = Path(name).name
    line = (
        'python -c "import torch; from safetensors.torch import save_file; '
        f"t = torch.load('{source}', map_location='cpu', weights_only=True); "
        f"save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{TENSORS_FILE}', "
        "metadata={'format': 'pt'})\""
    )
    return UnsupportedFile(
        f"{shorten(name)} is a pickle, which can run code when it is read; "
        f"convert it first: {line}",
        field="files",
        expected=TENSORS_FILE,
        came=f"{shorten(name)} (a pickle)",
    )


def shorten(value: object, length: int = 100) -> str:
    """Untrusted text made safe for an error message: printable and bounded."""
    text = "".join(char if char.isprintable() else "?" for char in str(value)[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


@contextmanager
def _open_regular(path: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a plain file (no link, pipe or device) within a size limit; gives it and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnsupportedFile(f"{path.name} is not a plain file", field=path.name) from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise UnsupportedFile(f"{path.name} is not a plain file", field=path.name)
    with os.fdopen(descriptor, "rb") as file:
        if facts.st_size > max_bytes:
            raise CheckpointTooLarge(
                f"{path.name} has {facts.st_size} bytes, at most {max_bytes} are accepted",
                field=path.name,
                expected=f"at most {max_bytes} bytes",
                came=f"{facts.st_size} bytes",
            )
        yield file, facts.st_size


# --- the header ---------------------------------------------------------------------------


def _parse_header(file: BinaryIO, size: int, name: str, limits: CheckpointLimits) -> _Header:
    start = file.read(_LENGTH_BYTES + 1)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    data_start = _LENGTH_BYTES + length
    if not start.endswith(b"{") or len(start) <= _LENGTH_BYTES or data_start > size:
        raise _not_safetensors(start, length, size, name)
    if length > limits.header_bytes:
        raise CheckpointTooLarge(
            f"{name}: the header has {length} bytes, at most {limits.header_bytes} are accepted",
            field=name,
            expected=f"a header of at most {limits.header_bytes} bytes",
            came=f"{length} bytes",
        )
    try:
        raw = parse_object(b"{" + file.read(length - 1), _HEADER_DEPTH)
    except StrictJsonError as error:
        raise _malformed(name, f"the header cannot be read: {error}") from error
    _check_metadata(raw.pop("__metadata__", {}), name)
    if len(raw) > limits.tensors:
        raise CheckpointTooLarge(
            f"{name} lists {len(raw)} tensors, at most {limits.tensors} are accepted",
            field=name,
            expected=f"at most {limits.tensors} tensors",
            came=f"{len(raw)} tensors",
        )
    entries = {key: _parse_entry(key, value, limits) for key, value in raw.items()}
    _check_ranges(entries, size - data_start, name)
    return _Header(entries, data_start)


def _not_safetensors(start: bytes, length: int, size: int, name: str) -> Exception:
    """The error for a file that does not start like safetensors."""
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        return pickle_refused(name)
    if start.startswith(b"version "):
        return UnsupportedFile(
            f"{name} is a Git LFS pointer, not the weights; run `git lfs pull` and send the file",
            field=name,
            expected="a safetensors file",
            came="a Git LFS pointer",
        )
    return HeaderInvalid(
        f"{name} is not a safetensors file: it declares a header of {length} bytes "
        f"and holds {size} bytes",
        field=name,
        expected="8 bytes of length, then a JSON object of that length",
        came=f"length {length}, then {start[_LENGTH_BYTES:]!r}",
    )


def _malformed(field: str, why: str, *, expected: str | None = None) -> HeaderInvalid:
    return HeaderInvalid(f"{shorten(field)}: {why}", field=shorten(field), expected=expected)


def _check_metadata(metadata: object, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(name, "__metadata__ must map strings to strings")


def _parse_entry(name: str, value: object, limits: CheckpointLimits) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _malformed(name, "an entry has exactly dtype, shape and data_offsets")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in _FLOAT_BYTES:
        raise TensorMismatch(
            f"{shorten(name)} has dtype {shorten(dtype)}; weights are {', '.join(_FLOAT_BYTES)}",
            field=shorten(name),
            expected=" or ".join(_FLOAT_BYTES),
            came=shorten(dtype),
        )
    shape = _parse_shape(name, value["shape"], limits)
    begin, end = _parse_offsets(name, value["data_offsets"])
    want = math.prod(shape) * _FLOAT_BYTES[dtype]
    if end - begin != want:
        raise _malformed(
            name,
            f"shape {list(shape)} of {dtype} takes {want} bytes, "
            f"data_offsets [{begin}, {end}] give {end - begin}",
            expected=f"{want} bytes",
        )
    return _Entry(TensorInfo(dtype, shape), begin, end)


def _parse_shape(name: str, shape: object, limits: CheckpointLimits) -> tuple[int, ...]:
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise _malformed(name, "shape must be a list of whole numbers, none negative")
    if len(shape) > limits.rank or any(length > limits.dimension for length in shape):
        raise CheckpointTooLarge(
            f"{shorten(name)}: shape {shorten(shape)} is over the limit of {limits.rank} "
            f"dimensions of {limits.dimension}",
            field=shorten(name),
            expected=f"at most {limits.rank} dimensions of at most {limits.dimension}",
            came=shorten(shape),
        )
    return tuple(shape)


def _parse_offsets(name: str, offsets: object) -> tuple[int, int]:
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_count(offset) for offset in offsets)
    ):
        raise _malformed(name, "data_offsets must be two whole numbers, none negative")
    return offsets[0], offsets[1]


def _is_count(value: object) -> bool:
    # bool is a subclass of int, but `true` is not a valid length.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_ranges(entries: Mapping[str, _Entry], data_bytes: int, file_name: str) -> None:
    """Ranges, in order, tile [0, data_bytes): no gap, no overlap, nothing after the last."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            fault = "overlaps the one before" if entry.begin < reached else "leaves a gap"
            raise _malformed(
                name,
                f"its data at [{entry.begin}, {entry.end}) {fault}",
                expected=f"data that starts at {reached}",
            )
        reached = entry.end
    if reached != data_bytes:
        raise _malformed(
            file_name,
            f"the tensors take {reached} bytes, the file holds {data_bytes} after its header",
            expected=f"{reached} bytes of data",
        )


# --- values -------------------------------------------------------------------------------


def _largest_served(dtype: str) -> float:
    """The largest weight that stays finite in float32 and in the dtype the base is served in."""
    import torch

    served = getattr(torch, dtype, torch.float32)
    return min(float(torch.finfo(served).max), _LARGEST_FLOAT32)


def _iterate_tensors(
    path: Path, names: Iterable[str], largest: float = _LARGEST_FLOAT32
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                tensor = file.get_tensor(name)
                _check_finite(name, tensor, largest)
                yield name, tensor
    except safetensors.SafetensorError as error:
        raise _malformed(path.name, f"safetensors does not take it: {shorten(error)}") from error


def _check_finite(name: str, tensor: torch.Tensor, largest: float) -> None:
    if tensor.numel() == 0:
        return
    # Two numbers, no mask as large as the tensor; NaN passes through both of them.
    low, high = (float(bound) for bound in tensor.aminmax())
    if -largest <= low and high <= largest:
        return
    raise NonFinite(
        f"{shorten(name)} holds NaN, infinity or a number that is infinite in the served dtype "
        f"(smallest {low}, largest {high})",
        field=shorten(name),
        expected=f"finite numbers of at most {largest:.3e}",
        came=f"[{low}, {high}]",
    )


# --- writing ------------------------------------------------------------------------------


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint folder in PEFT's format, atomically.

    Args:
        directory: must not exist, or be empty; its parent must exist.
        config: PEFT's fields; sets become sorted lists.
        tensors: PEFT's names; written contiguous and in their own dtype.

    Raises:
        FileExistsError: the folder already holds something.
        StorageFull: the disk is full; nothing is left behind.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds a checkpoint")
    import safetensors.torch as safetensors_torch

    text = json.dumps(canonical_config(config), indent=2, sort_keys=True, allow_nan=False)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors_torch.save(contiguous, metadata={"format": "pt"})
    with synced_files.full_disk_is_storage_full("the checkpoint"):
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            synced_files.write_file(temporary / CONFIG_FILE, text.encode())
            synced_files.write_file(temporary / TENSORS_FILE, data)
            temporary.chmod(0o755)  # mkdtemp makes it private; checkpoints must be readable
            synced_files.sync(temporary)
            temporary.rename(directory)
            synced_files.sync(directory.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0:
        block = file.read(min(num_bytes, 1 << 20))
        if not block:
            raise _malformed("data", "the file ends before its tensors do")
        num_bytes -= len(block)
        yield block
