"""Training jobs: `graftwork worker` and `graftwork jobs`.

The worker runs those of a data directory; its servers are started with `--train-workers 0`, or share
the work with it. `jobs` looks at them and cancels them, there or in a running server. Knows no engine.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from server.cli.command_group import CommandGroup
from server.cli.job_tables import EXPENDABLE, comparison_of, comparison_table, jobs_table
from server.cli.options import (
    AsJson,
    open_backend,
    prepare_base,
    takes_settings,
)
from server.cli.render import cell, err, fail, print_json, print_line, print_table
from server.config.settings import Settings
from server.store.job_states import FINISHED

JobId = Annotated[
    str,
    typer.Argument(metavar="JOB", help="A job's id, or an adapter's name: its newest job."),
]

jobs_app = typer.Typer(
    cls=CommandGroup,
    help="List, show, compare, follow, cancel and remove training jobs.",
    no_args_is_help=True,
)


def add_commands(app: typer.Typer) -> None:
    """Hang this file's commands into the command line."""
    app.command()(worker)
    app.add_typer(jobs_app, name="jobs")


@takes_settings(
    "base",
    "revision",
    "base_name",
    "data_dir",
    "dtype",
    "device",
    "train_workers",
    "train_threads",
    "train_memory_mib",
    "log_format",
    "log_level",
)
def worker(settings: Settings) -> None:
    """Run the training jobs of a data directory until a signal comes.

    Jobs that run then write a checkpoint and go back to the queue. For servers
    that are started with --train-workers 0; a job is done once, however many
    look for jobs.

    \b
    graftwork worker --data-dir /var/lib/graftwork --train-workers 2
    """
    if settings.train_workers == 0:
        raise fail("--train-workers is 0: this command would do nothing; expected 1 or more")
    prepare_base(settings, needs_tokenizer=False)
    _supervise(settings)


def _supervise(settings: Settings) -> None:
    from server.config.base_name import base_name
    from server.jobs.supervisor import Supervisor
    from server.logs import configure
    from server.store.jobs import JobStore
    from server.store.registry import Registry

    configure(settings.log_format, settings.log_level)
    digest = _base_digest(settings)
    name = base_name(settings)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings.data_dir, reserved=(name,))
    supervisor = Supervisor(
        JobStore(settings.data_dir),
        registry,
        settings.worker_config(name),
        workers=settings.train_workers,
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stopped.set())
    supervisor.start(digest)
    err.print(
        f"Graftwork runs the training jobs of {settings.data_dir}, {settings.train_workers} at once",
        highlight=False,
        soft_wrap=True,
    )
    stopped.wait()
    supervisor.stop()
    registry.close()


def _base_digest(settings: Settings) -> str:
    from adapters.errors import BaseUnsupported
    from server.base.digest import base_digest

    try:
        if Path(settings.base).is_dir():
            return base_digest(Path(settings.base))
        from server.base.load import describe_base

        return describe_base(settings.base, dtype=settings.dtype, revision=settings.revision).digest
    except (BaseUnsupported, OSError, ValueError) as error:
        raise fail(f"--base: {error}") from error


# --- jobs ------------------------------------------------------------------------------------


@jobs_app.command("list")
@takes_settings("url", "data_dir")
def list_jobs(
    *,
    settings: Settings,
    offset: Annotated[int, typer.Option(min=0, help="Leave out so many of the newest.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Jobs to show at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List training jobs, the newest first.

    \b
    graftwork jobs list --url http://127.0.0.1:8000
    """
    with open_backend(settings, jobs=True) as backend:
        jobs = backend.jobs(offset, limit)
    if as_json:
        print_json(jobs)
        return
    print_table(jobs_table(jobs), expendable=EXPENDABLE)


@jobs_app.command("show")
@takes_settings("url", "data_dir")
def show_job(job_id: JobId, *, settings: Settings, as_json: AsJson = False) -> None:
    """Show a job: its state, its options, its metrics.

    \b
    graftwork jobs show complaints
    """
    with open_backend(settings, jobs=True) as backend:
        shown = backend.job(job_id)
    if as_json:
        print_json(shown)
        return
    table = Table(show_header=False, box=None)
    for name, value in shown.items():
        if value not in (None, {}, []):
            table.add_row(name, Text(cell(value)))
    print_table(table)


@jobs_app.command("compare")
@takes_settings("url", "data_dir")
def compare_jobs(
    *,
    job_ids: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="Two or more: ids, or adapters' names."),
    ],
    settings: Settings,
    as_json: AsJson = False,
) -> None:
    """Compare jobs: settings that differ, and their metrics.

    \b
    graftwork jobs compare complaints complaints-ia3
    """
    if len(job_ids) < 2:
        raise fail("expected two jobs or more, such as complaints complaints-ia3; came one")
    with open_backend(settings, jobs=True) as backend:
        jobs = [backend.job(job_id) for job_id in job_ids]
    compared = comparison_of(jobs)
    if as_json:
        print_json(compared)
    else:
        print_table(comparison_table(compared))


@jobs_app.command("cancel")
@takes_settings("url", "data_dir")
def cancel_job(job_id: JobId, *, settings: Settings, as_json: AsJson = False) -> None:
    """End a job: one that waits at once, one that runs within seconds.

    \b
    graftwork jobs cancel job-a1ab28fe4d34fda420b6c479
    """
    with open_backend(settings, jobs=True) as backend:
        before = backend.job(job_id)
        job = backend.cancel_job(before["id"])
    if as_json:
        print_json(job)
        return
    if before["state"] in FINISHED:
        print_line(f"{job['id']} had ended before ({job['state']}); nothing was cancelled")
        return
    stops = job["cancel_requested"] and job["state"] == "running"
    print_line(f"{job['id']} is about to stop" if stops else f"{job['id']} is {job['state']}")


@jobs_app.command("remove")
@takes_settings("url", "data_dir")
def remove_job(job_id: JobId, *, settings: Settings, as_json: AsJson = False) -> None:
    """Remove a job that has ended; its adapter stays.

    Its rows, log and events go.

    \b
    graftwork jobs remove job-a1ab28fe4d34fda420b6c479
    """
    with open_backend(settings, jobs=True) as backend:
        removed = backend.remove_job(job_id)
    if as_json:
        print_json({"id": removed, "deleted": True})
    else:
        print_line(f"removed {removed}")


@jobs_app.command("log")
@takes_settings("url", "data_dir")
def job_log(
    *,
    job_id: JobId,
    settings: Settings,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last so many lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what the job's worker printed.

    \b
    graftwork jobs log job-a1ab28fe4d34fda420b6c479 --tail 20
    """
    with open_backend(settings, jobs=True) as backend:
        text = backend.job_log(job_id, tail)
    if as_json:
        print_json({"id": job_id, "log": text})
    else:
        typer.echo(text, nl=False)


@jobs_app.command("events")
@takes_settings("url", "data_dir")
def job_events(
    *,
    job_id: JobId,
    settings: Settings,
    after: Annotated[int, typer.Option(min=0, help="Only events after this id.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what happened to a job, an event a line.

    With --json a JSON object a line.

    \b
    graftwork jobs events job-a1ab28fe4d34fda420b6c479 --follow
    """
    with open_backend(settings, jobs=True) as backend:
        for event in backend.job_events(job_id, after, follow=follow):
            if as_json:
                print_json(event)
            else:
                print_line(event_line(event))


def event_line(event: Mapping[str, Any]) -> str:
    """An event of a job for people."""
    facts = "  ".join(f"{name} {_figure(value)}" for name, value in event["data"].items())
    return f"{event['id']:>5}  {event['at'][11:19]}  {event['kind']:<10}  {facts}"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
