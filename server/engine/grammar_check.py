"""Whether a grammar can be compiled within bounds, found out in a process that may be lost.

A schema of a kilobyte can keep a compiler busy for an hour or run over its stack, and neither can be
stopped inside a process that others need. So each grammar is compiled first in a child that has a
limit on its processor time and its memory, and that knows no vocabulary: it starts in a tenth of a
second. What passes there takes as long, and no more stack, in the engine's own process.

    python -m server.engine.grammar_check      the child: a line of JSON in, a line of JSON out

Knows no request, no mask and no tensor.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance import grammar_from as llguidance_grammar

from server.engine.request import Grammar

CPU_SECONDS = 2
# Wall-clock limit for a busy machine.
WALL_SECONDS = 20.0
MAX_BYTES = 1 << 30
# A model may break lines and indent, but not fill its output with white space.
WHITESPACE = r"\n?[ ]{0,16}"
_MAX_MESSAGE = 300
_NICENESS = 10
_NAMES = {
    "json_schema": "the JSON Schema",
    "regex": "the regular expression",
    "choice": "the choices",
}


class GrammarRefused(Exception):
    """A grammar that cannot be followed; the message says why.

    Attributes:
        lasting: whether it will be refused the next time too.
    """

    def __init__(self, message: str, *, lasting: bool = True) -> None:
        super().__init__(message)
        self.lasting = lasting


def compile_limits() -> LLParserLimits:
    """What compiling and masking may take: the library's own bounds, less memory and no dumps.

    With the library's own fuel, a million, the first mask of `((a{1000}){1000}){1000}` took three seconds
    and 180 MiB. This much is many times what a schema with hundreds of properties needs.
    """
    return LLParserLimits(initial_lexer_fuel=300_000, max_lexer_states=50_000, verbose_errors=False)


def source_of(grammar: Grammar) -> str:
    """A grammar in llguidance's own notation.

    Raises:
        GrammarRefused: the text is not JSON where it should be.
    """
    try:
        if grammar.kind == "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.text,
                defaults={"whitespace_flexible": True, "whitespace_pattern": WHITESPACE},
            )
        if grammar.kind == "regex":
            # \d means the ten digits, as in JSON Schema; a request for a date does not expect "٣".
            inner = regex_to_lark(grammar.text, use_ascii="d")
            return LLMatcher.grammar_from_lark(f"start: /{inner}/")
        return llguidance_grammar("choice", grammar.text)
    except ValueError as error:
        raise refused(grammar, str(error)) from None


def refused(grammar: Grammar, reason: str) -> GrammarRefused:
    """The refusal of a grammar for a reason that the library gave, in one line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    last = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = (last or lines or ["no reason was given"])[-1 if last else 0]
    if line.startswith("NoExtension"):
        line = "no output can satisfy it"
    return GrammarRefused(f"{_NAMES[grammar.kind]} cannot be followed: {line[:_MAX_MESSAGE]}")


class GrammarChecker:
    """A child process that compiles grammars, one at a time, for one thread.

    The child starts with the first check, and again after one that it did not survive.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar, source: str) -> None:
        """Compile a grammar and throw it away.

        Args:
            grammar: what is named in a refusal.
            source: `source_of(grammar)`.

        Raises:
            GrammarRefused: it is invalid, or takes too long, or too much memory.
        """
        process = self._running()
        watchdog = threading.Timer(WALL_SECONDS, process.kill)
        watchdog.start()
        try:
            answer = _ask(process, source)
        finally:
            watchdog.cancel()
        if answer is None:
            status = process.wait()
            self.close()
            raise _lost(grammar, status)
        if answer["error"] is not None:
            raise refused(grammar, answer["error"])

    def kill(self) -> None:
        """Let a check that is under way fail; for another thread."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.engine.grammar_check"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self._process


def _ask(process: subprocess.Popen[bytes], source: str) -> dict[str, Any] | None:
    """The child's answer; None when it died over the question."""
    if process.stdin is None or process.stdout is None:
        return None
    try:
        process.stdin.write(json.dumps(source).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        return None
    answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return answer


def _lost(grammar: Grammar, status: int) -> GrammarRefused:
    name = _NAMES[grammar.kind]
    if status == -signal.SIGXCPU:
        return GrammarRefused(f"{name} takes more than {CPU_SECONDS} seconds to compile")
    if status == -signal.SIGKILL:
        message = f"{name} was not compiled within {WALL_SECONDS:.0f} seconds"
        return GrammarRefused(message, lasting=False)
    return GrammarRefused(f"{name} takes too much memory, or nests too deeply, to compile")


# --- the child -----------------------------------------------------------------------------


def main() -> None:
    """Answer questions until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICENESS)
    for limit, most in ((resource.RLIMIT_AS, MAX_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # not every system has every limit
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
    for line in sys.stdin.buffer:
        _allow(CPU_SECONDS)
        failed, messages = LLMatcher.validate_grammar_with_warnings(
            json.loads(line), None, limits=compile_limits()
        )
        answer = {"error": messages[0] if failed else None}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _allow(seconds: int) -> None:
    """Limit this process's further processor time; the kernel ends it at the limit."""
    used = math.ceil(time.process_time())
    resource.setrlimit(
        resource.RLIMIT_CPU, (used + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1])
    )


if __name__ == "__main__":
    main()
