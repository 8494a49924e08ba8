"""Folded soft prompts on disk, so that neither an eviction nor a restart folds twice.

One file each beside the adapters, named by adapter, base and dtype. It carries a digest of its name and
its numbers: what a failing disk changed in a file would be served as if it were the adapter, and is folded
again instead. Only a cache: whatever is wrong with a file, it is removed. Knows no scheduler.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters.base_model import BaseModelSpec
from adapters.errors import AdapterError
from adapters.parts import KVPrefix

_DIGEST = "sha256"


class FoldFiles:
    """The folds of one base.

    Args:
        directory: where they are kept; None keeps none.
        base: what they were computed by, and are checked against.
    """

    def __init__(self, directory: Path | None, base: BaseModelSpec) -> None:
        self._directory = directory
        self._base = base

    def read(self, digest: str) -> KVPrefix | None:
        """An adapter's fold; None where there is none that can be trusted."""
        path = self._path(digest)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                form = KVPrefix(file.get_tensor("keys"), file.get_tensor("values"))
                kept = (file.metadata() or {}).get(_DIGEST)
            if kept == _digest(path.name, form):
                form.check(self._base)
                return form
        except (AdapterError, OSError, SafetensorError):
            pass  # half a file from a crash
        path.unlink(missing_ok=True)
        return None

    def write(self, digest: str, form: KVPrefix) -> None:
        """Keep an adapter's fold, if that can be."""
        path = self._path(digest)
        if path is None:
            return
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"keys": form.keys, "values": form.values}
            save_file(tensors, temporary, {_DIGEST: _digest(path.name, form)})
            temporary.replace(path)
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)  # the adapter is on the device already

    def _path(self, digest: str) -> Path | None:
        if self._directory is None:
            return None
        name = f"{digest}-{self._base.digest[:16]}-{self._base.dtype}.safetensors"
        return self._directory / name


def _digest(name: str, form: KVPrefix) -> str:
    whole = hashlib.sha256(name.encode())
    for tensor in (form.keys, form.values):
        whole.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
