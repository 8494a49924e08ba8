"""The child's side of `tests.benchmarks.children`; runs in any environment and imports nothing of ours."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(start: Callable[[], Callable[[dict[str, Any]], int]]) -> None:
    """Start, say so, then answer until the other end is closed.

    `start` returns what does a request and gives the number of its output tokens.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only answers may go to the pipe
    run = start()
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        tokens = run(request)
        seconds = time.perf_counter() - began
        answers.write(json.dumps({"tokens": tokens, "seconds": seconds}) + "\n")
        answers.flush()
    answers.close()
