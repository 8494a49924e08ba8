"""`graftwork.json`: training provenance, stored beside PEFT's two files.

Holds the job with every default resolved, its metrics, and the package versions used. PEFT and uploads
ignore the file; the command line and the demo read it. Independent of tensors.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from adapters import synced_files
from adapters.checkpoint.limits import MIB
from adapters.errors import ConfigInvalid
from adapters.field_errors import explain
from adapters.metadata import DEFAULT_TEMPERATURE, AdapterMetadata
from adapters.strict_json import StrictJsonError, parse_object
from adapters.training.job import TrainingJob

PROVENANCE_FILE = "graftwork.json"

_MAX_BYTES = 16 * MIB
# Nesting: the file, the job, its config or labels, and a list within.
_DEPTH = 8
_PACKAGES = ("graftwork", "torch", "transformers")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    job: TrainingJob
    metrics: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class Provenance:
    """How an adapter was trained.

    Attributes:
        job: the training job.
        metrics: its metrics, see `adapters.training.loop.Trained`.
        versions: package -> version used in training, and "python".
    """

    job: TrainingJob
    metrics: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of_now(cls, job: TrainingJob, metrics: dict[str, Any]) -> Provenance:
        """Provenance with the package versions of this process."""
        versions = {name: version(name) for name in _PACKAGES}
        return cls(job, metrics, {"python": platform.python_version(), **versions})

    def metadata(self) -> AdapterMetadata:
        """The metadata of the adapter, see `metadata_of`."""
        return metadata_of(self.job, self.metrics)

    def write(self, directory: Path) -> None:
        """Write the file into a folder; it must not exist there.

        Raises:
            StorageFull: the disk is full.
        """
        said = {
            "job": self.job.model_dump(mode="json"),
            "metrics": self.metrics,
            "versions": self.versions,
        }
        text = json.dumps(said, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with synced_files.full_disk_is_storage_full(PROVENANCE_FILE):
            synced_files.write_file(directory / PROVENANCE_FILE, text.encode())


def metadata_of(job: TrainingJob, metrics: dict[str, Any]) -> AdapterMetadata:
    """The metadata of an adapter that a job trained.

    An adapter trained on the base's chat template has no template of its own.
    """
    return AdapterMetadata(
        description=job.description,
        template=None if job.prompts == "chat" else job.template,
        labels=None if job.labels is None else tuple(job.labels),
        target_separator=job.target_separator,
        append_eos=job.append_eos,
        tokenization=job.tokenization,
        base_digest=job.base_digest,
        recipe=job.model_dump(mode="json") | ({DEFAULT_TEMPERATURE: 0.0} if job.labels else {}),
        metrics=metrics,
    )


def read_provenance(directory: Path) -> Provenance | None:
    """Read a folder's provenance; None if it has no such file.

    Raises:
        ConfigInvalid: the file does not have the expected format.
    """
    path = directory / PROVENANCE_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise _invalid(f"it has more than {_MAX_BYTES} bytes")
    try:
        said = _File.model_validate(parse_object(data, _DEPTH))
    except StrictJsonError as error:
        raise _invalid(str(error)) from error
    except ValidationError as error:
        raise _invalid(explain(error.errors(include_url=False), _File).message) from error
    return Provenance(said.job, said.metrics, said.versions)


def _invalid(fault: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"{PROVENANCE_FILE}: {fault}; expected what `graftwork train` writes, or no such file",
        field=PROVENANCE_FILE,
        expected="the file that graftwork train writes",
        came=fault,
    )
