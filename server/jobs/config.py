"""What a worker process is started with and how it may end, as plain data for both sides.

Knows nothing of the environment: `server.config.settings` reads that and fills this in.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

# Exit statuses of a worker that could not say in the jobs table how its job stands.
EXIT_DISK_FULL = 74
EXIT_STOPPED = 75
EXIT_LEASE_LOST = 76
EXIT_ORPHANED = 77
EXITS = {
    EXIT_DISK_FULL: "the disk is full, and so the jobs table took no word of it",
    EXIT_STOPPED: "it was asked to leave and wrote a checkpoint",
    EXIT_LEASE_LOST: "another worker has the job",
    EXIT_ORPHANED: "its parent is gone",
}


@dataclass(frozen=True)
class WorkerConfig:
    """Everything a worker knows beside its job.

    Attributes:
        data_dir: where the jobs, the adapters and their database live.
        base: local directory of the base model, or a hub id together with `revision`.
        base_name: what clients call the base; no adapter can have this name.
        revision: pinned revision of a hub id.
        dtype: number format of the frozen weights; None chooses by the hardware, as serving does.
        device: "cpu", "cuda", "cuda:1", ...
        threads: threads within one operation.
        nice: added to the process's niceness, 0 to 19.
        memory_bytes: private memory of the process at most; None does not limit it.
        checkpoint_seconds: between two checkpoints, about.
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
