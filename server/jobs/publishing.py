"""Publishes a trained adapter through `Registry.publish`, with the job's metadata.

The registry records the job's id with the adapter, so a worker that crashes between publishing and
writing the job's final state does not publish twice. Does not use torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterNotFound
from adapters.training.provenance import metadata_of
from server.store.registry import AdapterRecord, Registry

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from adapters.training.loop import Trained
    from server.jobs.config import WorkerConfig
    from server.store.jobs import JobRecord


@dataclass(frozen=True)
class Outcome:
    """The result of a job: the published version and the training metrics."""

    version: int
    metrics: dict[str, Any] | None


def published_by(registry: Registry, record: JobRecord) -> Outcome | None:
    """The outcome of a job that has published already; None if it has not."""
    versions: tuple[AdapterRecord, ...] = ()
    with contextlib.suppress(AdapterNotFound):
        versions = registry.versions(record.adapter)
    for version in versions:
        if version.job_id == record.id:
            return Outcome(version.version, version.metrics)
    return None


def publish(
    registry: Registry,
    config: WorkerConfig,
    record: JobRecord,
    base: BaseModelSpec,
    trained: Trained,
) -> Outcome:
    """Write a trained adapter and publish it under the job's name.

    Raises:
        AdapterError: refused by `Registry.publish`; nothing was published.
        OSError: the adapter cannot be written.
    """
    if (before := published_by(registry, record)) is not None:
        return before
    job = record.job
    metadata = metadata_of(job, trained.metrics)
    with registry.staging_dir() as staged:
        trained.write(staged)
        published = registry.publish(
            job.adapter,
            staged,
            base,
            replace(metadata, job_id=record.id, source="trained"),
            create_only=job.if_exists == "error",
            admitted=True,
            base_names=(config.base_name, config.base, job.base_name),
        )
    return Outcome(published.record.version, trained.metrics)
