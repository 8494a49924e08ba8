"""A worker process from its parent's side: start it, watch it, end it, keep its words.

    stdin    one line of JSON (`WorkerConfig`), then nothing until the parent is gone
    stdout   and stderr: the job's log, as much of it as `MAX_LOG_BYTES` allows

Knows no jobs table. What runs on the other side is `server.jobs.worker`.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from server.jobs.config import EXITS, WorkerConfig

MAX_LOG_BYTES = 4 * 1024 * 1024
_CUT = b"\n[the log is full: the rest is dropped]\n"
_BLOCK_BYTES = 65_536
_PUMP_SECONDS = 5.0


class WorkerProcess:
    """One worker process.

    Args:
        config: what it is started with.
        job_id: its job.
        token: the fencing token under which the job was claimed.
        log: the file that its words are appended to.

    Raises:
        OSError: the process or its log cannot be made.
    """

    def __init__(self, config: WorkerConfig, job_id: str, token: int, log: Path) -> None:
        command = [sys.executable, "-m", "server.jobs.worker", "--job", job_id]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own words
            [*command, "--token", str(token)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the server's terminal is the server's to handle.
            start_new_session=True,
        )
        self.pid = self._process.pid
        with contextlib.suppress(BrokenPipeError):  # it died at once: `poll` tells
            _stream(self._process.stdin).write(config.to_json().encode() + b"\n")
            _stream(self._process.stdin).flush()
        self._pump = threading.Thread(target=self._keep_words, args=(log,), daemon=True)
        self._pump.start()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to leave: it does at once, or in training after the step, with a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of a process that was killed or has ended, and for its last words."""
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            _stream(self._process.stdin).close()
        self._pump.join(_PUMP_SECONDS)

    def _keep_words(self, log: Path) -> None:
        pipe = _stream(self._process.stdout)
        with pipe:
            try:
                with log.open("ab", buffering=0) as file:
                    room = MAX_LOG_BYTES - file.tell()
                    while block := _read(pipe):
                        _write(file, block, room)
                        room -= len(block)
            except OSError:
                # A full disk costs the log, never the job: the pipe must not fill up.
                while _read(pipe):
                    pass


def describe_exit(code: int) -> str:
    """An exit status in words, such as "signal SIGKILL"."""
    if code >= 0:
        return f"exit status {code}" + (f" ({EXITS[code]})" if code in EXITS else "")
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _read(pipe: IO[bytes]) -> bytes:
    return pipe.read1(_BLOCK_BYTES)  # type: ignore[attr-defined,no-any-return]


def _write(file: IO[bytes], block: bytes, room: int) -> None:
    """Append what there is room for; the block that does not fit ends in a remark."""
    if room > 0:
        file.write(block[:room] + _CUT if len(block) > room else block)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the process was started without its pipes")
    return stream
