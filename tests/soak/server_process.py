"""The server of the soak: `graftwork serve` as a process of its own, small enough to be overloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE_NAME = "soak-base"
# Few places and a short queue: what is too much is soon told.
_SETTINGS = {
    "BASE_NAME": BASE_NAME,
    "PORT": "0",
    "DTYPE": "float32",
    "THREADS": "1",
    "KV_MIB": "8",
    "MAX_RUNNING": "6",
    "MAX_QUEUED": "24",
    "SCALE_SLOTS": "3",
    "TRAIN_THREADS": "1",
    "TRAIN_NICE": "0",
    "LOG_LEVEL": "warning",
}


@contextmanager
def serving(
    base: Path, data_dir: Path, log: Path, **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its address; it ends with the block. `settings` are as in its environment."""
    chosen = {f"GRAFTWORK_{name}": value for name, value in {**_SETTINGS, **settings}.items()}
    command = [sys.executable, "-m", "server", "serve", "--base", str(base)]
    command += ["--data-dir", str(data_dir)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env={**os.environ, **chosen, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )
    try:
        yield process, _address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        said = log.read_text(errors="replace")
        if found := re.search(r" on (http://[^,\s]+),", said):
            return found[1]
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {said}")
        time.sleep(0.05)
    raise TimeoutError("the server did not come up")
