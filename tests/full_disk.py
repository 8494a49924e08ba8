"""A script on a file system of its own that is too small, for what must survive a full disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run_on_a_small_disk(script: str, tmp_path: Path, size: str, *arguments: str) -> None:
    """Run `script` with the disk's folder, then `arguments`, as its arguments.

    It must print "held" and nothing else. Skips where the machine allows no private mounts.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs '{disk}'"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no private mounts here")
    python = [sys.executable, "-c", textwrap.dedent(script), str(disk), *arguments]
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == "held\n", result.stderr
