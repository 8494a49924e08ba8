"""`graftwork worker`: the training jobs of a data directory, run apart from a server.

Its servers are started with `--train-workers 0`, or share the work with it. Knows no route and no
engine.
"""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

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
    prepare_base,
    settings_from,
)
from server.settings import Settings


def add_commands(app: typer.Typer) -> None:
    """Hang this file's commands into the command line."""
    app.command()(worker)


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
