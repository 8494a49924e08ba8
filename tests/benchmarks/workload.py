"""What is asked of the contestants: prompts and lengths, the same in every run.

    W(c)   c requests at once, 48 prompt tokens and 64 new ones each
    W'(c)  prompts of 16 to 512 tokens, outputs of 8 to 256, coming one by one

Knows numbers only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

PROMPT_TOKENS, NEW_TOKENS = 48, 64
PROMPT_RANGE, NEW_RANGE = (16, 512), (8, 256)
# Ids below are the tokenizer's special ones.
_FIRST_ID = 100


def prompt(length: int, vocabulary: int, seed: object) -> list[int]:
    """Random token ids; another seed gives others."""
    generator = random.Random(f"prompt {seed}")
    return [generator.randrange(_FIRST_ID, vocabulary) for _ in range(length)]


def prompts(count: int, vocabulary: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """`count` prompts of W, no two of which begin alike."""
    return [prompt(length, vocabulary, index) for index in range(count)]


@dataclass(frozen=True)
class Lengths:
    """One request of W'."""

    prompt: int
    new: int


def mixed_lengths(seed: int, block: int = 32) -> Iterator[Lengths]:
    """Lengths of W' without end: their logarithms are even over the ranges.

    Every `block` in a row has each part of the ranges once, in an order of its own, so that runs of
    different seeds ask for nearly the same totals.
    """
    generator = random.Random(f"lengths {seed}")
    while True:
        columns = [_spread(limits, block, generator) for limits in (PROMPT_RANGE, NEW_RANGE)]
        for prompt_length, new in zip(*columns, strict=True):
            yield Lengths(prompt_length, new)


def _spread(limits: tuple[int, int], count: int, generator: random.Random) -> list[int]:
    low, high = (math.log(limit) for limit in limits)
    steps = list(range(count))
    generator.shuffle(steps)
    return [
        round(math.exp(low + (high - low) * (step + generator.random()) / count)) for step in steps
    ]
