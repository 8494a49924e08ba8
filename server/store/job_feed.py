"""The news of training jobs, read from the database once for all who follow a job.

Followers that have the same last event share one read; it begins a moment after the first of them asked.
Knows no request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from anyio.to_thread import run_sync

from server.errors import JobNotFound
from server.store.job_states import FINISHED
from server.store.jobs import JobEvent, JobStore

POLL_SECONDS = 0.25
_EVENTS_AT_ONCE = 500


@dataclass(frozen=True)
class News:
    """What came of a job after an event.

    Attributes:
        events: oldest first.
        more: whether there are more already.
        ended: whether these are the last: the job had ended, or is deleted.
    """

    events: tuple[JobEvent, ...]
    more: bool
    ended: bool


class JobFeed:
    """The reads that are under way, by job and last event."""

    def __init__(self) -> None:
        self._reads: dict[tuple[str, int], asyncio.Task[News]] = {}

    async def now(self, jobs: JobStore, job_id: str, after: int) -> News:
        """What came after an event; one that is deleted has ended.

        Args:
            jobs: in which the caller sees the job.
            job_id: the job.
            after: the event's id; 0 for all events.
        """
        return await run_sync(_read, jobs, job_id, after)

    async def later(self, jobs: JobStore, job_id: str, after: int) -> News:
        """The same in `POLL_SECONDS` or sooner, shared with others who ask for it meanwhile."""
        key = (job_id, after)
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = asyncio.create_task(self._poll(jobs, key))
        # One follower who leaves takes nothing from the others.
        return await asyncio.shield(read)

    async def _poll(self, jobs: JobStore, key: tuple[str, int]) -> News:
        await asyncio.sleep(POLL_SECONDS)
        # Later callers share a read that begins later.
        del self._reads[key]
        return await self.now(jobs, *key)


def _read(jobs: JobStore, job_id: str, after: int) -> News:
    try:
        # The state first: what is read after the job ended is all there will be.
        ended = jobs.get(job_id).state in FINISHED
        events = jobs.events(job_id, after, _EVENTS_AT_ONCE)
    except JobNotFound:
        return News((), more=False, ended=True)
    more = len(events) == _EVENTS_AT_ONCE
    return News(tuple(events), more, ended and not more)
