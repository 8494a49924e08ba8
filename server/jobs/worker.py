"""A worker process: `python -m server.jobs.worker --job ID --token N` runs one job, then exits.

Its configuration arrives as one line on standard input (`WorkerConfig`). Standard input then stays open
while the parent lives; EOF terminates the worker at once, so that no worker outlives a killed server.
This module sets the process limits and handles exit. `server.jobs.task`, imported after the limits are
set, does the work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from server.jobs.config import EXIT_ORPHANED, WorkerConfig

# Linux: OOM killer adjustment, -1000 to 1000; higher values are killed first.
_OOM_SCORE = "500"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one job.

    Returns:
        The exit status: 0 if the jobs table holds the outcome, else see `config.EXITS`.
    """
    parser = argparse.ArgumentParser(prog="server.jobs.worker")
    parser.add_argument("--job", required=True)
    parser.add_argument("--token", required=True, type=int)
    given = parser.parse_args(arguments)
    config = WorkerConfig.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(config.nice)
    _be_nice_as_a_session(config.nice)
    _be_first_to_go()

    from server.logs import configure

    configure("console", "info")

    import torch

    torch.set_num_threads(config.threads)
    torch.set_num_interop_threads(1)

    from server.jobs.task import run_job
    from server.store.jobs import Claim

    if config.memory_bytes is not None:
        # After the imports, whose memory is the same for every job.
        _limit_memory(config.memory_bytes)
    return run_job(config, Claim(given.job, given.token))


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    # Not sys.exit: this is not the main thread, and the exit must be immediate.
    os._exit(EXIT_ORPHANED)


def _be_nice_as_a_session(nice: int) -> None:
    # Linux schedules sessions first (autogroups); niceness applies only within a session. The worker
    # has a session of its own, so without this it gets the same CPU share as the server: with two busy
    # cores the engine's threads then waited for one another at every operation, and a step took
    # forty times as long.
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(nice), encoding="ascii")


def _be_first_to_go() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")


def _limit_memory(num_bytes: int) -> None:
    import resource

    # Private memory only: the mapped base would count against the address space.
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def _exit(code: int) -> NoReturn:
    # What Python and torch tear down takes seconds at this niceness, and frees what the system frees.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
