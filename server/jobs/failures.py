"""Maps an exception to a job's error: a stable code and one sentence.

Refusals have the codes of the API. The message of an unexpected exception is not exposed; the job's log
has it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from adapters import errors as library

INTERNAL_ERROR = "internal_error"
OUT_OF_MEMORY = "out_of_memory"
DISK_FULL = "disk_full"
# Failure codes of a job besides the refusals below; the last one is set by the store.
OTHER_CODES = frozenset({INTERNAL_ERROR, OUT_OF_MEMORY, DISK_FULL, "worker_lost"})

# A class covers its subclasses that are not listed.
CODES: dict[type[library.AdapterError], str] = {
    library.JobInvalid: "job_invalid",
    library.DataInvalid: "data_invalid",
    library.TemplateInvalid: "template_invalid",
    library.TrainingDiverged: "training_diverged",
    library.TrainingError: "training_refused",
    library.BaseMismatch: "base_mismatch",
    library.BaseUnsupported: "base_unsupported",
    library.ConfigInvalid: "config_invalid",
    library.MethodUnsupported: "method_unsupported",
    library.TensorMismatch: "tensor_mismatch",
    library.TargetNotFound: "target_not_found",
    library.NonFinite: "non_finite",
    library.CheckpointError: "checkpoint_invalid",
    library.NameInvalid: "name_invalid",
    library.AdapterExists: "adapter_exists",
    library.StorageUnavailable: "storage_unavailable",
}

_FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
# torch, safetensors and the C++ runtime raise generic errors, distinguished by these phrases.
_MEMORY_TERMS = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")
_DISK_TERMS = ("no space left on device", "disk quota exceeded", "disk is full")


def describe(error: BaseException) -> dict[str, str]:
    """`{"code", "message"}` for the exception that ended a job."""
    causes = list(_causes(error))
    if any(_is_full_disk(one) for one in causes):
        return failed(DISK_FULL, "the disk is full; nothing was published")
    if any(_is_out_of_memory(one) for one in causes):
        return failed(
            OUT_OF_MEMORY,
            "the training process ran out of memory; nothing was published. A smaller batch_size "
            "with more gradient_accumulation_steps needs less",
        )
    for kind in type(error).__mro__:
        if kind in CODES:
            return failed(CODES[kind], str(error))
    return failed(INTERNAL_ERROR, "an unforeseen error; the job's log has it")


def failed(code: str, message: str) -> dict[str, str]:
    """The shape of a job's error."""
    return {"code": code, "message": message}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes; a refusal may wrap a disk-full error."""
    while error is not None:
        yield error
        error = error.__cause__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, library.StorageFull):
        return True
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    return _mentions(error, _DISK_TERMS)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return _mentions(error, _MEMORY_TERMS)


def _mentions(error: BaseException, terms: tuple[str, ...]) -> bool:
    # A refusal's message may quote the user's data.
    if isinstance(error, library.AdapterError):
        return False
    text = str(error).lower()
    return any(term in text for term in terms)
