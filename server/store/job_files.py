"""The files of a job on disk.

    <root>/jobs/<id>/examples.jsonl   its rows as token ids, see `adapters.training.examples`
    <root>/jobs/<id>/state/           checkpoints of the run, while it is not finished
    <root>/jobs/<id>/log.txt          output of its workers

A job's folder appears by one rename, with its examples complete and synced. Independent of the database:
the job store decides when to remove a folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters import synced_files
from adapters.errors import TrainingError
from adapters.field_errors import quoted
from adapters.training.examples import Examples, from_lines, to_lines
from adapters.training.job import TrainingJob
from server.errors import JobNotFound
from server.store.staging import StagingArea

EXAMPLES_FILE = "examples.jsonl"
STATE_DIR = "state"
LOG_FILE = "log.txt"

_ID = re.compile(r"job-[0-9a-f]{24}")


class JobFiles:
    """The folders of all jobs under one root. Safe between threads and processes."""

    def __init__(self, root: Path) -> None:
        self._jobs = root / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._staging = StagingArea(root)
        self._holders = StagingArea(root, "holders")

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
    def staged(self, examples: Examples) -> Iterator[Path]:
        """A staging folder with the examples, synced; removed by the next sweep after a crash."""
        with self._staging.folder() as folder:
            synced_files.write_lines(folder / EXAMPLES_FILE, to_lines(examples))
            synced_files.sync(folder)
            yield folder

    def size_of(self, folder: Path) -> int:
        """Bytes of the examples and the log in a job's folder; what is not there has none."""
        num_bytes = 0
        for name in (EXAMPLES_FILE, LOG_FILE):
            with suppress(OSError):
                num_bytes += (folder / name).stat().st_size
        return num_bytes

    def num_bytes(self, job_id: str) -> int:
        """`size_of` of a job."""
        return self.size_of(self.directory(job_id))

    def place(self, staged: Path, job_id: str) -> None:
        """Move a staged folder to the job's place."""
        staged.rename(self.directory(job_id))
        synced_files.sync(self._jobs)

    def examples(self, job_id: str, job: TrainingJob) -> Examples:
        """The job's examples.

        Raises:
            TrainingError: the file is missing or damaged.
        """
        try:
            with (self.directory(job_id) / EXAMPLES_FILE).open("rb") as file:
                return from_lines(file, job)
        except FileNotFoundError as error:
            raise TrainingError(
                "the job's tokenized rows are missing; a version of Graftwork before they were stored "
                "queued it: delete the job and send it again"
            ) from error

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

    @contextmanager
    def held(self) -> Iterator[str]:
        """A name that `is_dead` once the block has ended, or the process."""
        with self._holders.folder() as folder:
            yield folder.name

    def is_dead(self, holder: str) -> bool:
        """Whether what had this name of `held` has ended."""
        return self._holders.is_abandoned(holder)

    def sweep_staging(self) -> int:
        """Remove staging folders of dead owners. Returns the number of entries removed."""
        self._holders.sweep()
        return self._staging.sweep()


def no_job(job_id: str, instead: str = "") -> JobNotFound:
    """The error for an id that no job has; `instead` goes on with what there is."""
    by_name = "" if job_id.startswith("job-") else ", and none of an adapter of that name"
    return JobNotFound(
        f"there is no training job {quoted(job_id)}{by_name}{instead}", field="id", came=job_id[:80]
    )
