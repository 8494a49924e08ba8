"""The parent's handle of a worker process: start, poll, stop, and capture its output.

    stdin    one line of JSON (`WorkerConfig`), then nothing until the parent is gone
    stdout   and stderr: the job's log, up to `MAX_LOG_BYTES`

Independent of the jobs table. The process runs `server.jobs.worker`.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
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
        config: its configuration.
        job_id: its job.
        token: the fencing token under which the job was claimed.
        log: the file that its output is appended to.

    Raises:
        OSError: the process or its log cannot be created.
    """

    def __init__(self, config: WorkerConfig, job_id: str, token: int, log: Path) -> None:
        _append(log, _first_line(job_id, config.nice))
        command = [sys.executable, "-m", "server.jobs.worker", "--job", job_id]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
            [*command, "--token", str(token)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the server's terminal must reach only the server.
            start_new_session=True,
        )
        self.pid = self._process.pid
        with contextlib.suppress(BrokenPipeError):  # it exited at once: `poll` reports it
            _stream(self._process.stdin).write(config.to_json().encode() + b"\n")
            _stream(self._process.stdin).flush()
        self._pump = threading.Thread(target=self._copy_output, args=(log,), daemon=True)
        self._pump.start()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def terminate(self) -> None:
        """Ask it to stop: at once, or during training after the current step, with a checkpoint."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()

    def close(self) -> None:
        """Wait for a process that was killed or has exited, and drain its output."""
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            _stream(self._process.stdin).close()
        self._pump.join(_PUMP_SECONDS)

    def _copy_output(self, log: Path) -> None:
        pipe = _stream(self._process.stdout)
        with pipe:
            try:
                with log.open("ab", buffering=0) as file:
                    room = MAX_LOG_BYTES - file.tell()
                    while block := _read(pipe):
                        _write(file, block, room)
                        room -= len(block)
            except OSError:
                # A full disk loses the log, never the job: keep draining the pipe.
                while _read(pipe):
                    pass


def _first_line(job_id: str, nice: int) -> bytes:
    # At once: the worker's own first line comes after its imports, seconds later at its niceness.
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return f"{at} [info     ] worker_started job={job_id} nice={nice}\n".encode()


def _append(log: Path, line: bytes) -> None:
    with contextlib.suppress(OSError), log.open("ab", buffering=0) as file:
        _write(file, line, MAX_LOG_BYTES - file.tell())


def describe_exit(code: int) -> str:
    """Describe an exit status, such as "signal SIGKILL"."""
    if code >= 0:
        return f"exit status {code}" + (f" ({EXITS[code]})" if code in EXITS else "")
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _read(pipe: IO[bytes]) -> bytes:
    return pipe.read1(_BLOCK_BYTES)  # type: ignore[attr-defined,no-any-return]


def _write(file: IO[bytes], block: bytes, room: int) -> None:
    """Append up to `room` bytes; a truncated block ends in a notice."""
    if room > 0:
        file.write(block[:room] + _CUT if len(block) > room else block)


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the process was started without its pipes")
    return stream
