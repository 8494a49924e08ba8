"""The files of a job on disk.

    <root>/jobs/<id>/rows.jsonl   its rows, one JSON object a line; written once
    <root>/jobs/<id>/state/       checkpoints of the run, while it is not finished
    <root>/jobs/<id>/log.txt      output of its workers

A job's folder appears by one rename, with its rows complete and synced. Independent of the database: the
job store decides when to remove a folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters import synced_files
from adapters.training.rows import Row
from server.errors import JobNotFound
from server.store.staging import StagingArea

ROWS_FILE = "rows.jsonl"
STATE_DIR = "state"

_ID = re.compile(r"job-[0-9a-f]{24}")


class JobFiles:
    """The folders of all jobs under one root. Safe between threads and processes."""

    def __init__(self, root: Path) -> None:
        self._jobs = root / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._staging = StagingArea(root)

    def directory(self, job_id: str) -> Path:
        """The path of a job's folder, which may not exist.

        Raises:
            JobNotFound: not a valid job id.
        """
        if not _ID.fullmatch(job_id):
            raise no_job(job_id)
        return self._jobs / job_id

    def ids(self) -> list[str]:
        """Every id that has a folder."""
        return sorted(entry.name for entry in self._jobs.iterdir() if _ID.fullmatch(entry.name))

    @contextmanager
    def staged(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[Path]:
        """A staging folder with the rows, synced; removed by the next sweep after a crash.

        Raises:
            ValueError: a number among the rows is not finite.
        """
        with self._staging.folder() as folder:
            lines = (json.dumps(row, allow_nan=False) + "\n" for row in rows)
            synced_files.write_lines(folder / ROWS_FILE, lines)
            synced_files.sync(folder)
            yield folder

    def place(self, staged: Path, job_id: str) -> None:
        """Move a staged folder to the job's place."""
        staged.rename(self.directory(job_id))
        synced_files.sync(self._jobs)

    def rows(self, job_id: str) -> list[Row]:
        """The job's rows.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        with (self.directory(job_id) / ROWS_FILE).open("rb") as file:
            return [json.loads(line) for line in file]

    def discard(self, job_id: str) -> None:
        """Remove a job's folder; it leaves `jobs/` by one rename."""
        with self._staging.folder() as grave:
            try:
                self.directory(job_id).rename(grave / job_id)
            except FileNotFoundError:
                return
            synced_files.sync(self._jobs)

    def discard_state(self, job_id: str) -> bool:
        """Remove a job's checkpoints. Returns whether there were any."""
        state = self.directory(job_id) / STATE_DIR
        found = state.exists()
        shutil.rmtree(state, ignore_errors=True)
        return found

    def sweep_staging(self) -> int:
        """Remove staging folders of dead owners. Returns the number of entries removed."""
        return self._staging.sweep()


def no_job(job_id: str) -> JobNotFound:
    """The error for an id that no job has."""
    shown = ascii(job_id)[1:-1][:80]
    return JobNotFound(f"there is no training job {shown!r}", field="id", came=shown)
