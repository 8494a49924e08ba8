"""The two places where the command line finds training jobs: a data directory, or a running server.

    JobPlace         what both can do, in the JSON of `GET /train`
    |-- StoredJobs   the table of a data directory; servers may run on it meanwhile
    `-- RemoteJobs   the routes under /train

Raises the library's errors, those of `server.errors` and `ServerRefused`; prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from server.cli.adapter_backends import require_data_dir
from server.cli.http_client import RemoteServer, is_segment
from server.store.job_files import no_job
from server.store.job_states import FINISHED

if TYPE_CHECKING:
    from server.store.jobs import JobRecord

Shown = dict[str, Any]

# Between two looks at the events of a job that runs.
_POLL_SECONDS = 0.5
# A server sends what it has at once, and then looks four times a second: after so long a silence
# there is nothing more yet.
_QUIET_SECONDS = 1.5


class JobPlace(Protocol):
    """Where jobs are. A job is a dict as `GET /train/{id}` has it.

    An event is a dict with `id`, `kind`, `data` and `at`.
    """

    def list(self, offset: int, limit: int) -> list[Shown]:
        """Jobs, the newest first."""
        ...

    def show(self, job_id: str) -> Shown:
        """A job as it is now."""
        ...

    def cancel(self, job_id: str) -> Shown:
        """End a job that waits, ask one that runs to end; the job as it is then."""
        ...

    def remove(self, job_id: str) -> None:
        """Remove a job that has ended, with its rows and log."""
        ...

    def log(self, job_id: str, tail: int | None) -> str:
        """What its worker printed, or the last lines of it."""
        ...

    def events(self, job_id: str, after: int, *, follow: bool) -> Iterator[Shown]:
        """Events after an id, until now or until the job has ended."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class StoredJobs:
    """The jobs of a data directory.

    Raises:
        RegistryError: there is no data directory.
    """

    def __init__(self, data_dir: Path) -> None:
        from server.store.jobs import JobStore

        require_data_dir(data_dir)
        self._store = JobStore(data_dir)

    def close(self) -> None:
        """Close the database."""
        self._store.close()

    def list(self, offset: int, limit: int) -> list[Shown]:
        """See `JobPlace`."""
        return [_json(record) for record in self._store.list(offset, limit)]

    def show(self, job_id: str) -> Shown:
        """See `JobPlace`."""
        return _json(self._store.get(job_id))

    def cancel(self, job_id: str) -> Shown:
        """See `JobPlace`."""
        return _json(self._store.cancel(job_id))

    def remove(self, job_id: str) -> None:
        """See `JobPlace`."""
        self._store.delete(job_id)

    def log(self, job_id: str, tail: int | None) -> str:
        """See `JobPlace`."""
        self._store.get(job_id)
        path = self._store.directory(job_id) / "log.txt"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return text if tail is None else "".join(text.splitlines(keepends=True)[-tail:])

    def events(self, job_id: str, after: int, *, follow: bool) -> Iterator[Shown]:
        """See `JobPlace`."""
        while True:
            # The state first: what is read after it ended is all there will be.
            ended = self._store.get(job_id).state in FINISHED
            found = self._store.events(job_id, after)
            for event in found:
                said = {"id": event.id, "kind": event.kind, "data": event.data}
                yield {**said, "at": event.at.isoformat()}
            if found:
                after = found[-1].id
            elif ended or not follow:
                return
            else:
                time.sleep(_POLL_SECONDS)


class RemoteJobs:
    """The jobs of a running server.

    Args:
        server: closed together with this.
    """

    def __init__(self, server: RemoteServer) -> None:
        self._server = server

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def list(self, offset: int, limit: int) -> list[Shown]:
        """See `JobPlace`; the longer fields are left out."""
        jobs: list[Shown] = self._server.get("/train", offset=offset, limit=min(limit, 1000))[
            "jobs"
        ]
        return jobs

    def show(self, job_id: str) -> Shown:
        """See `JobPlace`."""
        shown: Shown = self._server.get(_path(job_id))
        return shown

    def cancel(self, job_id: str) -> Shown:
        """See `JobPlace`."""
        shown: Shown = self._server.post(f"{_path(job_id)}/cancel")
        return shown

    def remove(self, job_id: str) -> None:
        """See `JobPlace`."""
        self._server.delete(_path(job_id))

    def log(self, job_id: str, tail: int | None) -> str:
        """See `JobPlace`."""
        return self._server.text(f"{_path(job_id)}/log", tail=tail)

    def events(self, job_id: str, after: int, *, follow: bool) -> Iterator[Shown]:
        """See `JobPlace`."""
        asked_at = datetime.now(UTC)
        route = f"{_path(job_id)}/events"
        while True:
            # As above: first the state, then what is there.
            ended = self.show(job_id)["state"] in FINISHED
            quiet = None if follow or ended else _QUIET_SECONDS
            for fields, data in self._server.events("GET", route, quiet_seconds=quiet, after=after):
                at = data.pop("at")
                after = int(fields["id"])
                yield {"id": after, "kind": fields["event"], "data": data, "at": at}
                if quiet is not None and datetime.fromisoformat(at) > asked_at:
                    return  # a job may tell its steps faster than they can be waited for
            if ended or not follow:
                return
            # The stream ends with the job, or with the server, which may come back.
            time.sleep(_POLL_SECONDS)


def _path(job_id: str) -> str:
    if not is_segment(job_id):
        raise no_job(job_id)
    return f"/train/{quote(job_id, safe='')}"


def _json(record: JobRecord) -> Shown:
    from server.api.training.job_replies import Job

    return Job.of(record).model_dump(mode="json")
