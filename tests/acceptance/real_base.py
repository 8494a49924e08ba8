"""The default base model for tests: where it is, and the marks of a test that needs it.

Knows where `make test` puts it; not how it is made.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from server.base.dtypes import default_dtype

ROOT = Path(__file__).parents[2]
BASE_DIR = ROOT / ".graftwork" / "base"

needs_base = pytest.mark.skipif(
    not (BASE_DIR / "graftwork_base.json").is_file(),
    reason="the default base is not in .graftwork/base; `make test` puts it there",
)
needs_bf16 = pytest.mark.skipif(
    default_dtype("cpu") != "bfloat16",
    reason="this processor does not compute in bfloat16: the base would be served in float32",
)
