"""Converts stored bytes to serving forms, off the engine's thread, and caches them in host memory.

Folded soft prompts are kept on disk too (`server.engine.folds`). Knows nothing of the scheduler: results
are polled.
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.base_model import BaseModelSpec
from adapters.errors import AdapterCorrupt
from adapters.parts import ActivationScales, KVPrefix, ServingForm, SoftPrompt
from server.engine.folds import FoldFiles
from server.engine.openmp import one_thread_here


@dataclass(frozen=True)
class Loaded:
    """A load that ended: a form, or the reason why there is none.

    `corrupt` says that the stored bytes are damaged: a file that cannot be opened just now, or an
    adapter that does not fit this base, is in order itself.
    """

    digest: str
    form: ServingForm | None
    error: str | None = None
    corrupt: bool = False


class HostCache:
    """Serving forms in host memory, least recently used out first.

    Args:
        max_bytes: what they may take together; the newest one stays even if it is larger.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._forms: OrderedDict[str, ServingForm] = OrderedDict()
        self._bytes = 0

    def get(self, digest: str) -> ServingForm | None:
        """The form, or None; a hit counts as use."""
        form = self._forms.get(digest)
        if form is not None:
            self._forms.move_to_end(digest)
        return form

    def put(self, digest: str, form: ServingForm) -> list[str]:
        """Keep a form; the digests that had to go for it."""
        if digest in self._forms:
            self._bytes -= form_bytes(self._forms.pop(digest))
        self._forms[digest] = form
        self._bytes += form_bytes(form)
        dropped = []
        while self._bytes > self._max_bytes and len(self._forms) > 1:
            old, out = self._forms.popitem(last=False)
            self._bytes -= form_bytes(out)
            dropped.append(old)
        return dropped

    def drop(self, digest: str) -> bool:
        """Keep a form no longer; whether it was here."""
        form = self._forms.pop(digest, None)
        if form is not None:
            self._bytes -= form_bytes(form)
        return form is not None


def form_bytes(form: ServingForm) -> int:
    """Bytes that a serving form takes."""
    return sum(tensor.nbytes for tensor in _tensors(form))


def _tensors(form: ServingForm) -> list[torch.Tensor]:
    if isinstance(form, KVPrefix):
        return [form.keys, form.values]
    if isinstance(form, SoftPrompt):
        return [form.embeddings]
    return [*form.inputs.values(), *form.outputs.values()]


class AdapterLoader:
    """Reads adapters on a thread of its own.

    Args:
        read_form: digest -> serving form; raises AdapterError or OSError.
        base: what the forms are checked against.
        dtype: what keys, values and embeddings are cast to; scales stay float32.
        folds_dir: where folded soft prompts are stored, or None.
    """

    def __init__(
        self,
        read_form: Callable[[str], ServingForm],
        base: BaseModelSpec,
        dtype: torch.dtype,
        folds_dir: Path | None,
    ) -> None:
        self._read_form = read_form
        self._base = base
        self._dtype = dtype
        self._folds = FoldFiles(folds_dir, base)
        self._done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._executor = ThreadPoolExecutor(1, "adapter-loader", initializer=one_thread_here)

    def start(self, digest: str) -> None:
        """Begin to read an adapter; `poll` returns it when it is loaded."""
        self._executor.submit(self._load, digest)

    def poll(self, timeout: float | None = None) -> Loaded | None:
        """The next finished load; waits up to `timeout` seconds when one is given."""
        try:
            if timeout is None:
                return self._done.get_nowait()
            return self._done.get(timeout=timeout)
        except queue.Empty:
            return None

    def keep_fold(self, digest: str, form: KVPrefix) -> None:
        """Write a folded soft prompt beside the adapters, off the engine's thread."""
        self._executor.submit(self._folds.write, digest, form)

    def close(self) -> None:
        """Let what is under way end and stop the thread."""
        self._executor.shutdown(wait=True)

    def _load(self, digest: str) -> None:
        try:
            form = self._folds.read(digest) or self._read_form(digest)
            form.check(self._base)
            self._done.put(Loaded(digest, self._cast(form)))
        except Exception as error:  # of any kind: sequences wait for this load to end
            corrupt = isinstance(error, AdapterCorrupt)
            self._done.put(Loaded(digest, None, str(error) or repr(error), corrupt))

    def _cast(self, form: ServingForm) -> ServingForm:
        if isinstance(form, KVPrefix):
            keys, values = form.keys.to(self._dtype), form.values.to(self._dtype)
            return KVPrefix(keys.contiguous(), values.contiguous())
        if isinstance(form, SoftPrompt):
            return SoftPrompt(form.embeddings.to(self._dtype))
        floats = [
            {path: v.float() for path, v in side.items()} for side in (form.inputs, form.outputs)
        ]
        return ActivationScales(*floats)
