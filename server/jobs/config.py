"""The configuration and exit statuses of a worker process, shared by parent and worker.

Independent of the environment, which `server.config.settings` reads.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

# Exit statuses of a worker that could not record its job's outcome in the jobs table.
EXIT_DISK_FULL = 74
EXIT_STOPPED = 75
EXIT_LEASE_LOST = 76
EXIT_ORPHANED = 77
EXITS = {
    EXIT_DISK_FULL: "the disk is full, so the outcome could not be written to the jobs table",
    EXIT_STOPPED: "it was stopped and wrote a checkpoint",
    EXIT_LEASE_LOST: "another worker has the job",
    EXIT_ORPHANED: "its parent process ended",
}


@dataclass(frozen=True)
class WorkerConfig:
    """The configuration of a worker, its job apart.

    Attributes:
        data_dir: directory of the jobs, the adapters and their database.
        base: local directory of the base model, or a hub id together with `revision`.
        base_name: the base's name in the API; no adapter can have this name.
        revision: pinned revision of a hub id.
        dtype: dtype of the frozen weights; None chooses by the hardware, as serving does.
        device: "cpu", "cuda", "cuda:1", ...
        threads: threads within one operation.
        nice: added to the process's niceness, 0 to 19.
        memory_bytes: limit on the private memory of the process; None is no limit.
        checkpoint_seconds: approximate time between two checkpoints.
    """

    data_dir: str
    base: str
    base_name: str
    revision: str | None = None
    dtype: str | None = None
    device: str = "cpu"
    threads: int = 1
    nice: int = 19
    memory_bytes: int | None = None
    checkpoint_seconds: float = 20.0

    def to_json(self) -> str:
        """One line; `from_json` is its inverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> WorkerConfig:
        """Rebuild from `to_json`'s form."""
        return cls(**json.loads(line))
