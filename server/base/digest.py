"""The digest that identifies a base model, and its cache.

A base is identified by its content, not its name: the digest covers the tensors (name, dtype, shape,
bytes) and the config, without the keys that record the origin of the files. Shard layout and file order
do not matter. Reads bytes only; uses neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

from adapters.base_files import weight_files
from adapters.errors import BaseUnsupported

CONFIG_FILE = "config.json"
DIGEST_CACHE_FILE = "graftwork_digest.json"

# Incremented when the hashed content changes, so that cached digests of other schemes are ignored.
_SCHEME = 1
# Origin, writer, and facts that the tensor headers record more reliably.
_VOLATILE_KEYS = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype"}
)
_MAX_HEADER_BYTES = 100_000_000


def base_digest(directory: Path, cache_dir: Path | None = None) -> str:
    """The digest of a base directory, sha256 in hex; computed once, then cached.

    The cache is keyed by size and modification time of every hashed file. It is stored beside the weights
    or, if that directory is read-only, in `cache_dir` (if given).

    Raises:
        BaseUnsupported: a weights file is not a valid safetensors file.
    """
    files = [directory / CONFIG_FILE, *weight_files(directory)]
    state = {"scheme": _SCHEME, "files": {file.name: _stamp(file) for file in files}}
    places = [directory / DIGEST_CACHE_FILE]
    if cache_dir is not None:
        key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
        places.append(cache_dir / f"{key}-{DIGEST_CACHE_FILE}")
    for place in places:
        if (known := _remembered(place, state)) is not None:
            return known
    digest = compute_digest(directory)
    for place in places:
        if _remember(place, state, digest):
            break
    return digest


def compute_digest(directory: Path) -> str:
    """Hash a base directory, with no cache. About a second for a gigabyte."""
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
    canonical = json.dumps(lasting, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    tensors: dict[str, str] = {}
    for file in weight_files(directory):
        tensors.update(_tensor_digests(file))
    total = hashlib.sha256(f"graftwork base {_SCHEME}\n{canonical}\n".encode())
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name]}\n".encode())
    return total.hexdigest()


def _tensor_digests(file: Path) -> dict[str, str]:
    """Tensor name -> "dtype shape sha256" for one safetensors file."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw,
        ):
            header, start = _header(raw)
            return {name: _entry_digest(raw, start, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseUnsupported(
            f"{file} is not a safetensors file: {error}; copy or fetch it again", field=file.name
        ) from error


def _entry_digest(raw: mmap.mmap, start: int, entry: dict[str, Any]) -> str:
    begin, end = entry["data_offsets"]
    if start + end > len(raw):
        raise ValueError(f"it ends after {len(raw)} bytes, before its tensors do")
    with memoryview(raw) as view, view[start + begin : start + end] as content:
        return f"{entry['dtype']} {entry['shape']} {hashlib.sha256(content).hexdigest()}"


def _header(raw: mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header's tensor entries and the offset at which the data begins."""
    size = int.from_bytes(raw[:8], "little")
    if not 2 <= size <= min(_MAX_HEADER_BYTES, len(raw) - 8):
        raise ValueError(f"a header of {size} bytes in a file of {len(raw)}")
    header: dict[str, Any] = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    return header, 8 + size


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _remembered(place: Path, state: dict[str, Any]) -> str | None:
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("state") != state:
        return None
    return str(known["digest"])


def _remember(place: Path, state: dict[str, Any], digest: str) -> bool:
    """Write one cache file; False if the path is not writable."""
    staged = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps({"state": state, "digest": digest}), encoding="utf-8")
        staged.replace(place)
    except OSError:
        return False
    return True
