"""Where clients live that are installed apart from everything else (`standalone.txt`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DIRECTORY = Path(sys.prefix) / "clients"


def require(package: str) -> Path:
    """The directory to put on the path; a test without its client fails, and says what to do."""
    if not (DIRECTORY / package).is_dir():
        pytest.fail(f"{package} is not in {DIRECTORY}; run 'make setup-test'")
    return DIRECTORY
