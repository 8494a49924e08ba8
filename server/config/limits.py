"""Every limit on what clients may ask for, as settings.

Part of `server.config.settings.Settings`, which reads them from the environment. Knows no route and
no error.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from adapters.checkpoint.limits import DEFAULT_LIMITS, MIB, CheckpointLimits
from adapters.training.rows import DataLimits

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """What clients may ask for. Every bound is inclusive."""

    max_queued: Count = Field(1024, description="Requests that may wait; more are refused (429).")
    max_queued_per_adapter: Count | None = Field(
        None,
        description="Requests for one adapter, or for the base, that may run or wait. Left out: "
        "max_running and half of max_queued, so that no adapter takes the whole queue.",
    )
    max_body_mib: Count = Field(8, description="Size of a JSON body in MiB at most.")
    max_json_values: Count = Field(
        500_000,
        description="Values in a JSON body at most, a field, list or object counting 4: what it takes "
        "to read a body grows with them, and not with its size.",
    )
    max_parts: Count = Field(64, description="Parts of a form at most.")
    max_field_kib: Count = Field(64, description="Size of a plain field of a form in KiB at most.")
    max_upload_mib: Count = Field(1100, description="Size of an uploaded adapter in MiB at most.")
    max_inflated_mib: int = Field(
        DEFAULT_LIMITS.file_bytes // MIB,
        ge=1,
        le=DEFAULT_LIMITS.file_bytes // MIB,
        description="Size of an adapter's tensors in MiB at most, out of an archive or not.",
    )
    max_tensors: int = Field(
        DEFAULT_LIMITS.tensors,
        ge=1,
        le=DEFAULT_LIMITS.tensors,
        description="Tensors of an uploaded adapter at most.",
    )
    max_virtual_tokens: Count = Field(
        2048, description="Virtual tokens of an adapter that is uploaded or trained at most."
    )
    max_prompt_characters: Count = Field(
        1_000_000,
        description="Characters of one text to tokenize at most; a million take about a second.",
    )
    max_prompt_tokens: Count | None = Field(
        None,
        description="Tokens of one prompt at most, virtual ones not counted. Left out: what fits.",
    )
    max_output_tokens: Count | None = Field(
        None, description="Tokens of one output at most. Left out: what fits."
    )
    max_best_of: Count = Field(
        8, description="Samples of one prompt that a request may draw, by n or best_of."
    )
    max_sequences: Count = Field(
        1024, description="Prompts times samples of one request to /v1/completions at most."
    )
    max_ranked: Count = Field(
        10_000, description="Inputs times labels of one request to /classify at most."
    )
    max_labels: Count = Field(1000, description="Labels of a request or of an adapter at most.")
    max_messages: Count = Field(
        10_000, description="Messages of a conversation, and parts of a message, at most."
    )
    max_stops: Count = Field(16, description="Stop strings of a request at most.")
    max_stop_characters: Count = Field(1000, description="Characters of a stop string at most.")
    max_logit_biases: Count = Field(1024, description="Entries of logit_bias at most.")
    max_data_mib: Count = Field(64, description="Size of a file of training rows in MiB at most.")
    max_data_rows: Count = Field(100_000, description="Training rows of a job at most.")
    max_queued_jobs: Count = Field(
        100, description="Training jobs that may wait; more are refused (429)."
    )
    max_files: Count = Field(1000, description="Files for fine-tuning that are kept at most.")
    max_files_mib: Count = Field(
        1024, description="Size of all files for fine-tuning together in MiB at most."
    )

    def checkpoint_limits(self) -> CheckpointLimits:
        """Those of an adapter on its way in. What is stored is read within the library's own."""
        return CheckpointLimits(
            file_bytes=self.max_inflated_mib * MIB,
            tensors=self.max_tensors,
            virtual_tokens=self.max_virtual_tokens,
        )

    def data_limits(self) -> DataLimits:
        """Those of one data set."""
        return DataLimits(max_rows=self.max_data_rows, max_bytes=self.max_data_mib * MIB)
