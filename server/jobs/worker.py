"""A worker process: `python -m server.jobs.worker --job ID --token N`, one job and then the end.

What it works with arrives as one line on standard input (`WorkerConfig`). Standard input then stays
open for as long as the parent lives: its end ends the worker, whatever that is doing, so that no
worker outlives a server that was killed. Here are the process's limits and its end; what it does is
in `server.jobs.task`, which is imported once the limits stand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from server.jobs.config import EXIT_ORPHANED, WorkerConfig

# Linux: whom to end first when the machine runs out of memory, from -1000 to 1000.
_OOM_SCORE = "500"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one job.

    Returns:
        The exit status: 0 where the jobs table says all there is to say, else see `config.EXITS`.
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
        # After the imports: what they need is the same for every job.
        _limit_memory(config.memory_bytes)
    return run_job(config, Claim(given.job, given.token))


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    # Not sys.exit: this is not the main thread, and nothing may delay it.
    os._exit(EXIT_ORPHANED)


def _be_nice_as_a_session(nice: int) -> None:
    # Linux shares the cores among sessions first (autogroups); niceness counts only within one. The
    # worker leads a session of its own, so without this it took as much as the server: with two busy
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


if __name__ == "__main__":
    sys.exit(main())
