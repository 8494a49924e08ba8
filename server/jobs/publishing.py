"""A trained adapter goes through the door that uploads use, with its job's words about it.

Whether a job has published is read off the registry by the job's id, so that a worker or a machine
that stops between publishing and writing the job's end publishes nothing twice. No torch.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterNotFound
from adapters.training.provenance import words_of
from server.store.registry import AdapterRecord, Registry

if TYPE_CHECKING:
    from adapters.base_model import BaseModelSpec
    from adapters.training.loop import Trained
    from server.jobs.config import WorkerConfig
    from server.store.jobs import JobRecord


@dataclass(frozen=True)
class Outcome:
    """What a job published: the adapter's version, and what training measured."""

    version: int
    metrics: dict[str, Any] | None


def published_by(registry: Registry, record: JobRecord) -> Outcome | None:
    """What a job has published already; None where nothing."""
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
        AdapterError: what `Registry.publish` refuses; nothing was published.
        OSError: it cannot be written.
    """
    if (before := published_by(registry, record)) is not None:
        return before
    job = record.job
    with registry.staging_dir() as staged:
        trained.write(staged)
        published = registry.publish(
            job.adapter,
            staged,
            base,
            create_only=job.if_exists == "error",
            base_names=(config.base_name, config.base, job.base_name),
            job_id=record.id,
            **words_of(job, trained.metrics),
        )
    return Outcome(published.record.version, trained.metrics)
