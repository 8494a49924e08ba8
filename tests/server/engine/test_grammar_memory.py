"""Grammars that take much memory are not kept by the dozen, and what they took comes back."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from server.engine.grammar import CACHED_BYTES, Guides
from server.engine.grammar_compiler import Vocabulary
from server.engine.request import Grammar, SamplingParams
from tests.server.http_server import byte_level_tokenizer

# Each takes its own 80 MiB or so to compile.
BOMBS = [f"((a{{1000}}){{1000}}){{{1000 + number}}}" for number in range(6)]


def private_bytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * sum(int(kib) for kib in re.findall(r"^Private_\w+: +(\d+)", text, re.MULTILINE))


@pytest.fixture
def guides():
    tokenizer = byte_level_tokenizer()
    guides = Guides(lambda: Vocabulary.of(tokenizer, [2]), len(tokenizer))
    yield guides
    guides.close()


def compile_it(guides: Guides, regex: str) -> None:
    """As an engine does it for a request that ends at once."""
    guides.start("r", SamplingParams(grammar=Grammar("regex", regex)))
    end = time.monotonic() + 60
    while not (started := guides.poll(0.05)):
        assert time.monotonic() < end
    assert started[0].refusal is None
    guides.forget("r")


def test_bombs_are_not_kept_beside_one_another(guides):
    compile_it(guides, "[a-z]+")
    before = private_bytes()
    for bomb in BOMBS:
        compile_it(guides, bomb)
    assert len(guides._cache) < 4
    compile_it(guides, "[0-9]+")
    compile_it(guides, "[0-9]+x")
    end = time.monotonic() + 20
    while private_bytes() - before > CACHED_BYTES + (32 << 20):
        assert time.monotonic() < end, (private_bytes() - before) >> 20
        time.sleep(0.05)


def test_small_grammars_stay(guides):
    for number in range(20):
        compile_it(guides, f"[a-z]{{1,{number + 1}}}")
    assert len(guides._cache) == 20
