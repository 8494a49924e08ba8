"""Every limit on requests, as settings.

Part of `server.config.settings.Settings`, which reads them from the environment. Independent of routes and
errors.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from adapters.checkpoint.limits import DEFAULT_LIMITS, MIB, CheckpointLimits
from adapters.training.rows import DataLimits
from server.store.job_limits import QueueLimits

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """Limits on requests. Every bound is inclusive."""

    max_queued: Count = Field(1024, description="Maximum waiting requests; more are refused (429).")
    max_queued_per_adapter: Count | None = Field(
        None,
        description="Maximum requests for one adapter, or for the base, that run or wait. Left out: "
        "max_running and half of max_queued, so that no adapter fills the whole queue.",
    )
    max_body_mib: Count = Field(8, description="Maximum size of a JSON body in MiB.")
    max_json_values: Count = Field(
        500_000,
        description="Maximum values in a JSON body, a field, list or object counting 4: the time "
        "to parse a body grows with them, not with its size.",
    )
    max_parts: Count = Field(64, description="Maximum parts of a form.")
    max_field_kib: Count = Field(64, description="Maximum size of a plain field of a form in KiB.")
    max_upload_mib: Count = Field(1100, description="Maximum size of an uploaded adapter in MiB.")
    max_inflated_mib: int = Field(
        DEFAULT_LIMITS.file_bytes // MIB,
        ge=1,
        le=DEFAULT_LIMITS.file_bytes // MIB,
        description="Maximum size of an adapter's tensors in MiB, after unpacking.",
    )
    max_tensors: int = Field(
        DEFAULT_LIMITS.tensors,
        ge=1,
        le=DEFAULT_LIMITS.tensors,
        description="Maximum tensors of an uploaded adapter.",
    )
    max_virtual_tokens: Count = Field(
        2048, description="Maximum virtual tokens of an uploaded or trained adapter."
    )
    max_prompt_characters: Count = Field(
        1_000_000,
        description="Maximum characters of one text to tokenize; a million take about a second.",
    )
    max_prompt_tokens: Count | None = Field(
        None,
        description="Maximum tokens of one prompt, without virtual tokens. Left out: what fits.",
    )
    max_output_tokens: Count | None = Field(
        None, description="Maximum tokens of one output. Left out: what fits."
    )
    max_best_of: Count = Field(
        8, description="Maximum samples of one prompt in a request, by n or best_of."
    )
    max_sequences: Count = Field(
        1024, description="Maximum prompts times samples of one request to /v1/completions."
    )
    max_ranked: Count = Field(
        10_000, description="Maximum inputs times labels of one request to /classify."
    )
    max_labels: Count = Field(1000, description="Maximum labels of a request or an adapter.")
    max_aliases: Count = Field(100, description="Maximum aliases of one adapter.")
    max_messages: Count = Field(
        10_000, description="Maximum messages of a conversation, and parts of a message."
    )
    max_stops: Count = Field(16, description="Maximum stop strings of a request.")
    max_stop_characters: Count = Field(1000, description="Maximum characters of a stop string.")
    max_logit_biases: Count = Field(1024, description="Maximum entries of logit_bias.")
    max_data_mib: Count = Field(64, description="Maximum size of a file of training rows in MiB.")
    max_data_rows: Count = Field(100_000, description="Maximum training rows of a job.")
    max_queued_jobs: Count = Field(
        100, description="Maximum waiting training jobs; more are refused (429)."
    )
    max_queued_jobs_per_owner: Count | None = Field(
        None,
        description="Maximum waiting training jobs of one caller: a key, or the keys of a tenant. Left "
        "out: half of max_queued_jobs. Without keys only max_queued_jobs counts.",
    )
    max_queued_jobs_mib: Count = Field(
        1024, description="Maximum size of the rows of all waiting training jobs together in MiB."
    )
    max_queued_jobs_mib_per_owner: Count | None = Field(
        None, description="The same of one caller's. Left out: half of max_queued_jobs_mib."
    )
    max_files: Count = Field(1000, description="Maximum stored files for fine-tuning.")
    max_files_per_owner: Count | None = Field(
        None,
        description="Maximum stored files of one caller: a key, or the keys of a tenant. Left out: half "
        "of max_files. Without keys only max_files counts.",
    )
    max_files_mib: Count = Field(
        1024, description="Maximum size of all files for fine-tuning together in MiB."
    )
    max_files_mib_per_owner: Count | None = Field(
        None, description="The same of one caller's. Left out: half of max_files_mib."
    )

    def checkpoint_limits(self) -> CheckpointLimits:
        """The limits on a new adapter. Stored adapters are read with the library's default limits."""
        return CheckpointLimits(
            file_bytes=self.max_inflated_mib * MIB,
            tensors=self.max_tensors,
            virtual_tokens=self.max_virtual_tokens,
        )

    def queue_limits(self) -> QueueLimits:
        """The limits on waiting training jobs."""
        own = self.max_queued_jobs_mib_per_owner
        return QueueLimits(
            max_jobs=self.max_queued_jobs,
            max_bytes=self.max_queued_jobs_mib * MIB,
            max_jobs_per_owner=self.max_queued_jobs_per_owner,
            max_bytes_per_owner=None if own is None else own * MIB,
        )

    def data_limits(self) -> DataLimits:
        """The limits on one data set."""
        return DataLimits(max_rows=self.max_data_rows, max_bytes=self.max_data_mib * MIB)
