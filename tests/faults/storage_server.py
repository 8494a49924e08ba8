"""`graftwork serve` as a process of its own, for faults of its disk and of the process itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.http_server import save_prefix_adapter, upload

HOOKS = Path(__file__).parent / "hooks"
BASE_NAME = "tiny-base"
BODY = {"inputs": "the tweet is", "parameters": {"max_new_tokens": 6, "details": True}}


@dataclass(frozen=True)
class Served:
    """A server that answers.

    Attributes:
        process: the server.
        client: to it.
        data_dir: its data directory, as it is seen from here.
    """

    process: subprocess.Popen[bytes]
    client: httpx.Client
    data_dir: Path

    def blobs(self) -> set[str]:
        return {path.name for path in (self.data_dir / "blobs").iterdir()}

    def staging(self) -> list[str]:
        return [path.name for path in (self.data_dir / "staging").iterdir()]

    def listed(self) -> dict[str, dict[str, Any]]:
        """Every adapter at its default version, by name."""
        reply = self.client.get("/adapters")
        assert reply.status_code == 200, reply.text
        return {one["name"]: one for one in reply.json()["adapters"]}

    def digests(self) -> set[str]:
        """Of every version."""
        names = self.listed()
        replies = [self.client.get(f"/adapters/{name}").json() for name in names]
        return {version["digest"] for reply in replies for version in reply["versions"]}

    def add(self, folder: Path, name: str, seed: int, **fields: str) -> httpx.Response:
        """Upload an adapter made from a seed."""
        return upload(self.client, save_prefix_adapter(folder / f"{name}-{seed}", seed=seed), name)

    def answer(self, name: str) -> list[dict[str, Any]]:
        """The tokens that an adapter answers with, log-probabilities included."""
        return answer(self.client, name)


def answer(client: httpx.Client, name: str) -> list[dict[str, Any]]:
    """The tokens that an adapter answers with, log-probabilities included."""
    reply = client.post(f"/generate?adapter={name}", json=BODY)
    assert reply.status_code == 200, reply.text
    tokens: list[dict[str, Any]] = reply.json()["details"]["tokens"]
    return tokens


@contextmanager
def serving(
    base: Path,
    data_dir: Path,
    log: Path,
    *,
    prefix: tuple[str, ...] = (),
    faults: Path | None = None,
    in_namespace: bool = False,
) -> Iterator[Served]:
    """A server on a data directory, until the end of the block.

    Args:
        base: the base that it serves.
        data_dir: as the server sees it.
        log: a file for its words.
        prefix: a command that runs it.
        faults: the folder of `tests/faults/hooks`; None for a server without hooks.
        in_namespace: whether `prefix` gives it mounts of its own.
    """
    command = [*prefix, sys.executable, "-m", "server", "serve", "--base", str(base), "--port", "0"]
    command += ["--data-dir", str(data_dir), "--dtype", "float32", "--threads", "1"]
    command += ["--base-name", BASE_NAME, "--kv-mib", "16", "--max-running", "8"]
    # As nice as the others: on a busy machine a job would hardly begin.
    environment = {**os.environ, "GRAFTWORK_TRAIN_NICE": "0"}
    if faults is not None:
        environment |= {"FAULTS": str(faults), "PYTHONPATH": str(HOOKS)}
    with log.open("wb") as words:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=words,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
    try:
        address = _address(process, log)
        seen = data_dir
        if in_namespace:
            seen = Path(f"/proc/{process.pid}/root{data_dir}")
        with httpx.Client(base_url=address, timeout=60) as client:
            yield Served(process, client, seen)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Poll until something is so.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {seconds} s")
        time.sleep(0.02)


def private_mounts() -> tuple[str, ...]:
    """The command that gives a process mounts of its own; skips where the machine allows none."""
    command = ("unshare", "-rm")
    if (
        shutil.which("unshare") is None
        or shutil.which("nsenter") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no private mounts here")
    return command


def in_namespace_of(process: subprocess.Popen[bytes], *command: str) -> None:
    """Run a command among the mounts of a process."""
    enter = ["nsenter", "-t", str(process.pid), "-U", "-m", "--preserve-credentials"]
    subprocess.run([*enter, *command], check=True, capture_output=True)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    found: list[str] = []

    def told() -> bool:
        said = log.read_text(errors="replace")
        assert process.poll() is None, f"the server ended: {said}"
        found.extend(re.findall(r" on (http://[^,\s]+),", said))
        return bool(found)

    wait_for(told, 120)
    return found[0]
