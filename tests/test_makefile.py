"""Installing says little when it works, and all that is needed when it does not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FROM_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(venv: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`make` with an empty environment in `venv`, and no Python that makes one."""
    return subprocess.run(
        ["make", f"VENV={venv}", "PYTHON=true", *words],
        cwd=ROOT,
        # Under `make test` this make would take itself for a part of that one, and say so.
        env={name: value for name, value in os.environ.items() if name not in FROM_MAKE},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_installation_prints_what_and_how_long(tmp_path):
    venv = tmp_path / "venv"
    ran = make(venv, "PIP=echo pip", "setup-test")
    assert ran.returncode == 0, ran.stderr
    what, serve, tests, done = ran.stdout.splitlines()
    assert what == f"== installing Graftwork and its dependencies into {venv} (once)"
    assert tests == "== installing the test dependencies (once)"
    for line in (serve, done):
        assert line.startswith("   done in ")
    assert (venv / "install.log").read_text().startswith("pip -e .[test]\n")
    assert (venv / ".serve").is_file()
    assert (venv / ".test").is_file()
    assert "installing" not in make(venv, "PIP=false", "setup-test").stdout


def test_a_failure_shows_the_end_of_the_log_and_its_place(tmp_path):
    venv = tmp_path / "venv"
    ran = make(venv, "PIP=seq 40; false", "setup")
    assert ran.returncode != 0
    lines = ran.stdout.splitlines()
    assert lines[1:-1] == [str(number) for number in range(29, 41)]
    assert lines[-1] == f"   failed; all that was printed is in {venv}/install.log"
    assert len((venv / "install.log").read_text().splitlines()) == 40
    assert not (venv / ".serve").exists()
