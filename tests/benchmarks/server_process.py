"""`graftwork serve` as a process: its address, its processor time, its memory. Knows no requests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

_START_SECONDS = 120


@dataclass(frozen=True)
class ServerProcess:
    """A server that is ready.

    Attributes:
        process: its first process.
        port: on the loopback address.
        ready_seconds: from the command to the first 200 of /readyz.
    """

    process: psutil.Process
    port: int
    ready_seconds: float

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def family(self) -> list[psutil.Process]:
        """It and its children."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """User and system time of all its processes."""
        times = [process.cpu_times() for process in self.family()]
        return sum(t.user + t.system for t in times)

    def memory(self) -> dict[str, int]:
        """Bytes, a shared page counted once: `anonymous`, `file` (of mapped files), `shared`."""
        totals = {"Pss_Anon": 0, "Pss_File": 0, "Pss_Shmem": 0}
        for process in self.family():
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in totals:
                    totals[name] += int(value.split()[0]) * 1024
        return dict(zip(("anonymous", "file", "shared"), totals.values(), strict=True))


@contextmanager
def serving(
    base: str, data_dir: Path, environment: Mapping[str, str] | None = None, **settings: object
) -> Iterator[ServerProcess]:
    """A server that ends with the block; `settings` are as in its environment, in lower case."""
    port = _free_port()
    command = [sys.executable, "-m", "server", "serve", "--base", base, "--port", str(port)]
    command += ["--data-dir", str(data_dir)]
    chosen = {f"GRAFTWORK_{name.upper()}": str(value) for name, value in settings.items()}
    log = data_dir.with_suffix(".log")
    with log.open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env={**os.environ, "GRAFTWORK_LOG_LEVEL": "warning", **chosen, **(environment or {})},
        )
    try:
        _wait_ready(port, process, log)
        ready = time.perf_counter() - began
        yield ServerProcess(psutil.Process(process.pid), port, ready)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        while time.monotonic() < end:
            try:
                if client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.02)
    raise TimeoutError("the server did not come up")
