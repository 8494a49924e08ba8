"""Connections fit among the descriptors; each case in a process of its own, whose limit it sets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.http.descriptors import NUM_OTHERS

CODE = """
import resource, sys
from server.http.descriptors import room_for
soft, hard, asked = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print("room", room_for(asked), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "asked", "room", "soft_then"),
    [
        (800, 900, 500, 500, 800),
        (300, 900, 500, 500, 500 + NUM_OTHERS),
        (300, 600, 500, 600 - NUM_OTHERS, 600),
        (100, 200, 500, 1, 200),
    ],
    ids=["enough", "raised", "not enough", "hardly any"],
)
def test_the_limit_is_raised_where_it_may_be(soft, hard, asked, room, soft_then):
    told = subprocess.run(
        [sys.executable, "-c", CODE, str(soft), str(hard), str(asked)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert told[-1] == f"room {room} {soft_then} {hard}"
    assert any("few_descriptors" in line for line in told) == (room < asked)
