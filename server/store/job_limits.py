"""How many jobs may wait, and how long those that have ended are kept: for all, and for each owner.

Rules over numbers that the job store reads; independent of the database and of files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from server.errors import TooManyJobs

MIB = 1024 * 1024
# A stored event of a job with its share of the index, roughly.
EVENT_BYTES = 200


@dataclass(frozen=True)
class QueueLimits:
    """Limits on queued jobs.

    A job is larger than the limit in bytes only if none of its owner's waits: what one job may have is
    limited where its rows are read.

    Attributes:
        max_jobs: of all owners together.
        max_bytes: the same for their training rows as stored, in bytes.
        max_jobs_per_owner: of one owner; None is half of all.
        max_bytes_per_owner: the same in bytes.
    """

    max_jobs: int = 100
    max_bytes: int = 1024 * MIB
    max_jobs_per_owner: int | None = None
    max_bytes_per_owner: int | None = None

    def check_owner(self, num_jobs: int, num_bytes: int, new_bytes: int) -> None:
        """Check one more job of an owner who has these waiting.

        Raises:
            TooManyJobs: the owner has too many; numbers are the owner's.
        """
        _check(
            "of yours wait, and a caller may have",
            (num_jobs, half(self.max_jobs, self.max_jobs_per_owner)),
            (num_bytes, half(self.max_bytes, self.max_bytes_per_owner)),
            new_bytes,
        )

    def check_all(
        self, num_jobs: int, num_bytes: int, new_bytes: int, *, counts_shown: bool
    ) -> None:
        """Check one more job where these wait of all owners together.

        Raises:
            TooManyJobs: the queue is full; with its numbers only if `counts_shown`.
        """
        try:
            _check(
                "wait, and the limit is",
                (num_jobs, self.max_jobs),
                (num_bytes, self.max_bytes),
                new_bytes,
            )
        except TooManyJobs:
            if counts_shown:
                raise
            raise TooManyJobs("the queue of training jobs is full; try again later") from None


@dataclass(frozen=True)
class Retention:
    """What is kept of the jobs of one owner that have ended. Their adapters stay.

    Attributes:
        days: after these a job is removed.
        max_jobs: the newest so many are kept.
        max_bytes: the newest so many bytes are kept: rows, log and events.
    """

    days: int = 30
    max_jobs: int = 1_000
    max_bytes: int = 2048 * MIB

    def expired(self, jobs: Iterable[EndedJob], now: datetime) -> list[str]:
        """Ids of jobs to remove, of jobs given the newest first."""
        before = now - timedelta(days=self.days)
        taken: dict[str | None, tuple[int, int]] = {}
        found = []
        for job in jobs:
            count, num_bytes = taken.get(job.owner, (0, 0))
            # What its events take stays counted: the jobs before it are older still.
            count, num_bytes = count + 1, num_bytes + job.num_bytes
            taken[job.owner] = (count, num_bytes)
            too_many = count > self.max_jobs or (num_bytes > self.max_bytes and count > 1)
            if too_many or job.finished_at < before:
                found.append(job.id)
        return found


@dataclass(frozen=True)
class EndedJob:
    """A job that has ended; `num_bytes` includes its log and events."""

    id: str
    owner: str | None
    finished_at: datetime
    num_bytes: int


def half(total: int, share: int | None) -> int:
    """One owner's share of a limit: the one given, else half, so that one never takes it all."""
    return (total + 1) // 2 if share is None else share


def _check(words: str, jobs: tuple[int, int], size: tuple[int, int], new_bytes: int) -> None:
    num_jobs, max_jobs = jobs
    num_bytes, max_bytes = size
    if num_jobs >= max_jobs:
        raise TooManyJobs(
            f"{num_jobs} training jobs {words} {max_jobs}; try again later",
            expected=f"fewer than {max_jobs} waiting jobs",
            came=str(num_jobs),
        )
    if num_jobs and num_bytes + new_bytes > max_bytes:
        raise TooManyJobs(
            f"training jobs of {num_bytes} bytes {words} {max_bytes} bytes, this one included with "
            f"{new_bytes}; try again later",
            expected=f"at most {max_bytes} bytes of waiting jobs",
            came=str(num_bytes + new_bytes),
        )
