"""The error tree of the adapter library.

    AdapterError                 anything this library refuses
    |-- CheckpointError          the bytes of a checkpoint are not acceptable
    |   |-- CheckpointTooLarge   a limit is exceeded (checked on the header, before allocation)
    |   |-- UnsupportedFile      a kind of file that is never read (pickles, unknown archives)
    |   |-- FileSetInvalid       not exactly the two files of one checkpoint
    |   |-- ArchiveInvalid       a zip or tar that is broken or that tries to leave its folder
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
    |-- TrainingError            a training job cannot be done
    |   |-- JobInvalid           a field of the job is wrong, or two of them disagree
    |   |-- DataInvalid          the rows cannot be trained on; `row` counts from 1 where one is at fault
    |   `-- TrainingDiverged     the loss is no longer a finite number
    `-- RegistryError            the store cannot do what was asked
        |-- NameInvalid          not an adapter name
        |-- AdapterNotFound      no adapter of that name
        |-- VersionNotFound      the adapter has no such version
        |-- AdapterExists        create-only was asked for and the name is taken
        |-- AdapterCorrupt       the stored bytes no longer match their digest
        |-- StorageFull          the disk took no more bytes
        `-- StorageUnavailable   the disk or the database cannot be used just now

`Refused` is the base of this tree and of the server's. Every error carries facts as plain attributes
(`field`, `expected`, `came`); nothing here knows HTTP.
"""

from __future__ import annotations


class Refused(Exception):
    """Base of what is refused with facts: of this tree, and of the server's own.

    Args:
        message: one sentence for the user: what was expected and what was found.
        field: the config field, tensor or form field that is at fault, if one is.
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


class AdapterError(Refused):
    """Base of the tree."""


class CheckpointError(AdapterError):
    """The bytes of a checkpoint are not acceptable."""


class CheckpointTooLarge(CheckpointError):
    """A limit is exceeded; found on the header, before anything is allocated."""


class UnsupportedFile(CheckpointError):
    """A kind of file that is never read, such as a pickle."""


class FileSetInvalid(CheckpointError):
    """Not exactly the two files of one checkpoint."""


class ArchiveInvalid(CheckpointError):
    """A zip or tar that is broken or that tries to leave its folder."""


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
    """Adapters that cannot be added up, or weights that cannot weigh them."""


class MergeInvalid(AdapterError):
    """An adapter that cannot become part of a base, or a place where the result cannot go."""


class TrainingError(AdapterError):
    """A training job cannot be done."""


class JobInvalid(TrainingError):
    """A field of a training job is wrong, or two of them disagree."""


class DataInvalid(TrainingError):
    """The rows cannot be trained on.

    Args:
        message: as for `AdapterError`, as are field, expected and came.
        row: the row at fault, counted from 1; None where it is all of them.
        field: the column, if one is at fault.
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
    """The loss is no longer a finite number."""


class RegistryError(AdapterError):
    """The store cannot do what was asked."""


class NameInvalid(RegistryError):
    """Not an adapter name."""


class AdapterNotFound(RegistryError):
    """No adapter of that name."""


class VersionNotFound(RegistryError):
    """The adapter has no such version."""


class AdapterExists(RegistryError):
    """Create-only was asked for and the name is taken."""


class AdapterCorrupt(RegistryError):
    """The stored bytes no longer match their digest."""


class StorageFull(RegistryError):
    """The disk took no more bytes."""


class StorageUnavailable(RegistryError):
    """The disk or the database cannot be used just now: read-only, locked, out of descriptors."""
