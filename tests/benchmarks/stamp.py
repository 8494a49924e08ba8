"""What a figure depends on: kept beside every measure, so that none is taken for another's.

Knows no measures.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.install import LLAMA_PACKAGE, VLLM_PACKAGE

_ROOT = Path(__file__).parents[2]
_CODE = ("server", "adapters", "tests/benchmarks")
_LIBRARIES = ("torch", "numba", "transformers", "peft")
# Said beside the figures; a measure that differs in these alone is the same measure.
INFORMATION = ("commit", "date")


def stamp_of(
    base: str, dtype: str, threads: int, concurrency: int, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """The engine's code and options, the base's digest, the libraries and the machine, as plain data."""
    return {
        "code": _code_digest(),
        "base": base,
        "dtype": dtype,
        "threads": threads,
        "concurrency": concurrency,
        "changes": dict(changes),
        "versions": [f"{name}=={version(name)}" for name in _LIBRARIES],
        "peers": [LLAMA_PACKAGE, VLLM_PACKAGE],
        **_machine(),
        "commit": _commit(),
    }


def difference(known: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first field in which two stamps differ; None where they stand for the same measure."""
    names = [name for name in {**known, **now} if name not in INFORMATION]
    return next((name for name in names if known.get(name) != now.get(name)), None)


def text(stamp: Mapping[str, Any]) -> str:
    """A stamp in a few lines."""
    changes = "".join(f", {name}={value}" for name, value in stamp["changes"].items())
    return (
        f"{stamp['processor']}, {stamp['cores']} cores ({' '.join(stamp['features'])})\n"
        f"{stamp['threads']} threads, {stamp['dtype']}, base {stamp['base'][:12]}{changes}\n"
        f"{', '.join(stamp['versions'])}; where they took part: {', '.join(stamp['peers'])}\n"
        f"commit {stamp['commit'] or 'unknown'}, code {stamp['code']}"
    )


def _code_digest() -> str:
    digest = hashlib.sha256()
    for directory in _CODE:
        for path in sorted((_ROOT / directory).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str:
    """The checkout's commit; empty where there is none."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _machine() -> dict[str, Any]:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cores": os.cpu_count(),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "features": sorted(flag for flag in flags.split() if "bf16" in flag or "amx" in flag),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
