"""The error tree of the adapter library.

    AdapterError                 base of the tree
    |-- CheckpointError          the bytes of a checkpoint are not acceptable
    |   |-- CheckpointTooLarge   a limit is exceeded (checked on the header, before allocation)
    |   |-- UnsupportedFile      a file of a kind that is never read (pickles, unknown archives)
    |   |-- FileSetInvalid       not exactly the two files of one checkpoint
    |   |-- ArchiveInvalid       a broken zip or tar, or one with a path outside its folder
    |   |-- HeaderInvalid        the safetensors header is malformed or does not fit its file
    |   |-- ConfigInvalid        adapter_config.json is not a valid config of its method
    |   |-- MethodUnsupported    a peft_type or task_type that is not served here
    |   |-- TensorMismatch       tensor names, dtypes or shapes do not fit the config or the base
    |   |-- TargetNotFound       an IA3 target matches no module of the base
    |   `-- NonFinite            NaN or infinity among the weights
    |-- BaseMismatch             the adapter was trained on another base (recorded digest differs)
    |-- BaseUnsupported          the base model cannot be served, with the reason
    |-- TemplateInvalid          a template that does not parse, or a row that does not fit it
    |-- CombineInvalid           adapters that cannot be combined, or invalid weights
    |-- MergeInvalid             an adapter that cannot be merged into a base
    |-- TrainingError            a training job cannot run
    |   |-- JobInvalid           a field of the job is invalid, or two fields conflict
    |   |-- DataInvalid          the rows are invalid; `row` is the number of the faulty one, from 1
    |   `-- TrainingDiverged     the loss is not finite
    `-- RegistryError            a request to the registry cannot be fulfilled
        |-- NameInvalid          not a valid adapter name
        |-- AdapterNotFound      no adapter of that name
        |-- VersionNotFound      the adapter has no such version
        |-- AdapterExists        the name is in use, and the caller required a new one
        |-- AdapterCorrupt       the stored bytes no longer match their digest
        |-- StorageFull          the disk is full
        `-- StorageUnavailable   the disk or the database cannot be used at the moment

`Refused` is the base of this tree and of the server's. Errors carry facts as plain attributes (`field`,
`expected`, `came`). Independent of HTTP.
"""

from __future__ import annotations


class Refused(Exception):
    """Base of all refusals: this tree, and that of the server.

    Args:
        message: one sentence for the user: what was expected and what was found.
        field: the faulty config field, tensor or form field, if it is one.
        expected: what would have been accepted.
        came: what was found.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        expected: str | None = None,
        came: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.expected = expected
        self.came = came


def reason_of(error: BaseException) -> str:
    """What another library raised, in one line of at most 200 characters for a refusal's message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class AdapterError(Refused):
    """Base of the tree."""


class CheckpointError(AdapterError):
    """The bytes of a checkpoint are not acceptable."""


class CheckpointTooLarge(CheckpointError):
    """A limit is exceeded; found on the header, before anything is allocated."""


class UnsupportedFile(CheckpointError):
    """A file of a kind that is never read, such as a pickle."""


class FileSetInvalid(CheckpointError):
    """Not exactly the two files of one checkpoint."""


class ArchiveInvalid(CheckpointError):
    """A broken zip or tar, or one with a path outside its folder."""


class HeaderInvalid(CheckpointError):
    """The safetensors header is malformed or does not fit its file."""


class ConfigInvalid(CheckpointError):
    """`adapter_config.json` is not a valid config of its method."""


class MethodUnsupported(CheckpointError):
    """A `peft_type` or `task_type` that is not served here."""


class TensorMismatch(CheckpointError):
    """Tensor names, dtypes or shapes do not fit the config or the base."""


class TargetNotFound(CheckpointError):
    """An IA3 target that matches no module of the base."""


class NonFinite(CheckpointError):
    """NaN or infinity among the weights."""


class BaseMismatch(AdapterError):
    """The adapter records the digest of another base."""


class BaseUnsupported(AdapterError):
    """The base model cannot be served; the message gives the reason."""


class TemplateInvalid(AdapterError):
    """A template that does not parse, or a row that does not fit it."""


class CombineInvalid(AdapterError):
    """Adapters that cannot be combined, or invalid weights."""


class MergeInvalid(AdapterError):
    """An adapter that cannot be merged into a base, or an output path that cannot be used."""


class TrainingError(AdapterError):
    """A training job cannot run."""


class JobInvalid(TrainingError):
    """A field of a training job is invalid, or two fields conflict."""


class DataInvalid(TrainingError):
    """The rows of a training job are invalid.

    Args:
        message: as for `AdapterError`, as are field, expected and came.
        row: number of the faulty row, from 1; None if the fault is not in a single row.
        field: the faulty column, if it is one.
        expected: what would have been accepted.
        came: what was found.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        field: str | None = None,
        expected: str | None = None,
        came: str | None = None,
    ) -> None:
        super().__init__(message, field=field, expected=expected, came=came)
        self.row = row


class TrainingDiverged(TrainingError):
    """The loss is not finite."""


class RegistryError(AdapterError):
    """A request to the registry cannot be fulfilled."""


class NameInvalid(RegistryError):
    """Not a valid adapter name."""


class AdapterNotFound(RegistryError):
    """No adapter of that name."""


class VersionNotFound(RegistryError):
    """The adapter has no such version."""


class AdapterExists(RegistryError):
    """The name is in use, and the caller required a new one."""


class AdapterCorrupt(RegistryError):
    """The stored bytes no longer match their digest."""


class StorageFull(RegistryError):
    """The disk is full."""


class StorageUnavailable(RegistryError):
    """The disk or the database cannot be used at the moment: read-only, locked, out of descriptors."""
