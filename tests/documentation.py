"""The documentation as the tests read it: its pages, and the module that generates tables."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# Every text that describes the product to people, generated parts left out.
PAGES = (
    README,
    ROOT / "SECURITY.md",
    ROOT / "docker" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)


@cache
def hooks() -> ModuleType:
    """docs/hooks.py; the folder is no package."""
    spec = importlib.util.spec_from_file_location(
        "graftwork_docs_hooks", ROOT / "docs" / "hooks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
