"""The training jobs of a data directory without a server: `graftwork worker` and `graftwork jobs`.

The worker runs them; its servers are started with `--train-workers 0`, or share the work with it.
`jobs` looks at them and cancels them. Knows no engine.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from server.cli_options import (
    Base,
    DataDir,
    Device,
    DtypeOption,
    LogFormat,
    LogLevel,
    Revision,
    TrainWorkers,
    err,
    fail,
    option,
    out,
    prepare_base,
    settings_from,
)
from server.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from server.jobs.store import JobEvent, JobRecord, JobStore

# Between two looks at the events of a job that runs.
_POLL_SECONDS = 0.5

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job, such as job-a1ab28fe4d34….")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

jobs_app = typer.Typer(help="Look at training jobs, and cancel them.", no_args_is_help=True)


def add_commands(app: typer.Typer) -> None:
    """Hang this file's commands into the command line."""
    app.command()(worker)
    app.add_typer(jobs_app, name="jobs")


def worker(
    base: Base = None,
    revision: Revision = None,
    base_name: Annotated[str | None, option("base_name", "--base-name")] = None,
    data_dir: DataDir = None,
    dtype: DtypeOption = None,
    device: Device = None,
    train_workers: TrainWorkers = None,
    train_threads: Annotated[int | None, option("train_threads", "--train-threads")] = None,
    train_memory_mib: Annotated[
        int | None, option("train_memory_mib", "--train-memory-mib")
    ] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Run the training jobs of a data directory until a signal comes.

    Jobs that run then write a checkpoint and go back to the queue. For servers that are started
    with --train-workers 0; a job is done once, however many look for jobs.
    """
    settings = settings_from(
        base=base,
        revision=revision,
        base_name=base_name,
        data_dir=data_dir,
        dtype=dtype,
        device=device,
        train_workers=train_workers,
        train_threads=train_threads,
        train_memory_mib=train_memory_mib,
        log_format=log_format,
        log_level=log_level,
    )
    if settings.train_workers == 0:
        raise fail("--train-workers is 0: this command would do nothing; expected 1 or more")
    prepare_base(settings)
    _supervise(settings)


def _supervise(settings: Settings) -> None:
    from adapters.registry import Registry
    from server.app import base_name
    from server.jobs.store import JobStore
    from server.jobs.supervisor import Supervisor
    from server.logs import configure

    configure(settings.log_format, settings.log_level)
    name = base_name(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings.data_dir, reserved=(name,))
    supervisor = Supervisor(
        JobStore(settings.data_dir),
        registry,
        settings.worker_config(name),
        workers=settings.train_workers,
    )
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: asked.set())
    supervisor.start()
    err.print(
        f"Graftwork runs the training jobs of {settings.data_dir}, {settings.train_workers} at once",
        highlight=False,
        soft_wrap=True,
    )
    asked.wait()
    supervisor.stop()
    registry.close()


# --- jobs ------------------------------------------------------------------------------------


@jobs_app.command("list")
def list_jobs(
    data_dir: DataDir = None,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many of the newest.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Jobs to show at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List training jobs, the newest first."""
    with _store(data_dir) as store:
        records = store.list(offset, limit)
    if as_json:
        typer.echo(json.dumps([_as_json(record) for record in records], ensure_ascii=False))
        return
    table = Table("id", "state", "adapter", "method", "step", "created")
    for record in records:
        created = f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC"
        words = (record.id, record.state, record.adapter, record.method, _step(record), created)
        table.add_row(*(Text(word) for word in words))
    out.print(table)


@jobs_app.command("show")
def show_job(job_id: JobId, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Show a job: how it stands, what it is asked to do, what it measured."""
    with _store(data_dir) as store:
        shown = _as_json(store.get(job_id))
    if as_json:
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    table = Table(show_header=False, box=None)
    for name, value in shown.items():
        if value not in (None, {}, []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            table.add_row(name, Text(_shortened(text)))
    out.print(table)


@jobs_app.command("cancel")
def cancel_job(job_id: JobId, data_dir: DataDir = None) -> None:
    """End a job: one that waits at once, one that runs within seconds."""
    with _store(data_dir) as store:
        record = store.cancel(job_id)
    asked = record.cancel_requested and record.state == "running"
    text = f"{job_id} is about to stop" if asked else f"{job_id} is {record.state}"
    out.print(text, highlight=False)


@jobs_app.command("log")
def job_log(
    job_id: JobId,
    data_dir: DataDir = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last so many lines.")] = None,
) -> None:
    """Print what the job's worker printed."""
    with _store(data_dir) as store:
        store.get(job_id)
        path = store.directory(job_id) / "log.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines(keepends=True)
    typer.echo("".join(lines if tail is None else lines[-tail:]), nl=False)


@jobs_app.command("events")
def job_events(
    job_id: JobId,
    data_dir: DataDir = None,
    after: Annotated[int, typer.Option(min=0, help="Only events after this id.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what happened to a job, an event a line."""
    with _store(data_dir) as store:
        for event in _events(store, job_id, after, follow=follow):
            if as_json:
                said = {"id": event.id, "kind": event.kind, "data": event.data}
                line = json.dumps({**said, "at": event.at.isoformat()}, ensure_ascii=False)
            else:
                facts = "  ".join(f"{name} {_figure(value)}" for name, value in event.data.items())
                line = f"{event.id:>5}  {event.at:%H:%M:%S}  {event.kind:<10}  {facts}"
            typer.echo(line)


@contextmanager
def _store(data_dir: Path | None) -> Iterator[JobStore]:
    """The jobs of a data directory that is there; refusals end the command with one line."""
    from adapters.errors import AdapterError
    from server.errors import RequestRefused
    from server.jobs.store import JobStore

    settings = settings_from(data_dir=data_dir)
    if not settings.data_dir.is_dir():
        raise fail(f"there is no data directory {settings.data_dir}")
    try:
        store = JobStore(settings.data_dir)
        try:
            yield store
        finally:
            store.close()
    except (AdapterError, RequestRefused) as error:
        raise fail(error.message) from error


def _events(store: JobStore, job_id: str, after: int, *, follow: bool) -> Iterator[JobEvent]:
    from server.jobs.states import FINISHED

    while True:
        # The state first: what is read after it ended is all there will be.
        ended = store.get(job_id).state in FINISHED
        found = store.events(job_id, after)
        yield from found
        if found:
            after = found[-1].id
        elif ended or not follow:
            return
        else:
            time.sleep(_POLL_SECONDS)


def _as_json(record: JobRecord) -> dict[str, object]:
    from server.api.train import job_json

    return job_json(record)


def _step(record: JobRecord) -> str:
    progress = record.progress
    return f"{progress['step']} of {progress['max_steps']}" if progress else ""


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
