"""Contestants in processes of their own, asked over pipes, idle while another is measured.

A child is a program that reads one JSON object a line and answers each with one: `{"tokens", "seconds"}`
for `{"prompts", "new_tokens"}`. Its first line says `{"ready": true}`. What else it prints goes to its log.

A process each, for two reasons: peers need other versions of the same libraries, and a second team of
OpenMP threads in one process slows the first.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ChildFailed(Exception):
    """A contestant ended, or never began; the message holds the end of its log."""


class Child:
    """One contestant.

    Args:
        command: the program and its arguments.
        log: where its output goes.
        environment: what it sees beside this process's own environment.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, **(environment or {})},
            )

    def wait_ready(self) -> None:
        """Until it has loaded everything."""
        self._read()

    def rate(self, prompts: Sequence[Sequence[int]], new_tokens: int, **more: Any) -> float:
        """Output tokens a second of all prompts at once; `more` is for children that want it."""
        answer = self.ask({"prompts": prompts, "new_tokens": new_tokens, **more})
        return float(answer["tokens"] / answer["seconds"])

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self) -> ChildFailed:
        said = self._log.read_text(errors="replace")[-1500:]
        return ChildFailed(f"{self._process.args}: ended with {self._process.wait()}\n{said}")
