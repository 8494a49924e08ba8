"""What must stand in the README stands there."""

from __future__ import annotations

import re
from pathlib import Path

from server.api import errors
from server.jobs import failures

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_error_code_is_documented():
    codes = {refusal.code for refusal in errors.TABLE.values()}
    codes |= {refusal.code for refusal in errors.FAILED.values()}
    codes |= set(errors.HTTP_CODES.values()) | {errors.UNFORESEEN.code}
    codes |= set(failures.CODES.values()) | failures.OTHER_CODES
    documented = set(re.findall(r"`([a-z_0-9]+)`", README.split("## Errors")[1]))
    assert codes - documented == set()
