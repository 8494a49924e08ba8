"""Commands of this machine: podman and buildah with a storage of their own, and what they say.

Knows no image and no Dockerfile. Standard library only.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

REPO = Path(__file__).resolve().parents[2]
WORK = REPO / ".graftwork" / "image-test"


class Failed(Exception):
    """A step went wrong; the message is for the person who ran this."""


def storage() -> list[str]:
    """Images of our own, away from the machine's."""
    return ["--root", str(WORK / "storage"), "--runroot", str(WORK / "run")]


def podman() -> list[str]:
    """podman as it runs without systemd."""
    return ["podman", *storage(), "--cgroup-manager=cgroupfs", "--runtime=runc"]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(
    command: list[str],
    *,
    check: bool = True,
    stdin: IO[bytes] | None = None,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command; Failed with the end of what it said if it fails and `check`."""
    result = subprocess.run(  # noqa: S603 - our own words
        command, check=False, capture_output=True, text=True, stdin=stdin
    )
    said = f"{result.stdout}{result.stderr}"
    if log is not None:
        log.write_text(said, encoding="utf-8")
    if check and result.returncode != 0:
        raise Failed(f"{shlex.join(command)}: exit status {result.returncode}\n{said[-3000:]}")
    return result


def output(command: list[str]) -> str:
    """What a command printed, without white space at its ends."""
    return run(command).stdout.strip()


def with_time(what: str, step: Callable[[], object]) -> None:
    """Run a step and say how long it took."""
    began = time.monotonic()
    step()
    say(f"image-test: {what}: {time.monotonic() - began:.1f} s")


def say(line: str) -> None:
    """One line for the person who ran this."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
