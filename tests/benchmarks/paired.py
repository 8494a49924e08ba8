"""Paired comparisons: contestants take turns, and what counts is the median of their paired ratios.

Timings on a shared machine drift; the two halves of a pair, measured one after the other, drift together.
Whom a ratio near its bar compares should stand side by side in the order of contestants.
Knows nothing of engines, files or tables.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# One measurement in a round; the argument is the round's number.
Contestant = Callable[[int], float]
# Called after every round with what is known so far.
Keep = Callable[[dict[str, Any]], None]

_RESAMPLES = 4000
# An interval of fewer pairs says nothing about a bar.
LEAST_PAIRS = 9


@dataclass(frozen=True)
class Bar:
    """What a ratio is held against.

    Attributes:
        above: contestant whose figure is divided.
        below: contestant by whose figure it is divided.
        limit: to be reached by the interval; None is reported only.
        sense: whether the ratio is to be at least or at most `limit`.
    """

    above: str
    below: str
    limit: float | None = None
    sense: Literal["at least", "at most"] = "at least"


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]


def reaches(figure: float, limit: float, sense: str) -> bool:
    """Whether a figure is at least, or at most, as much as is asked."""
    return figure >= limit if sense == "at least" else figure <= limit


def is_met(bar: Bar, pairs: int, low: float, high: float) -> bool | None:
    """Whether the interval reaches the bar; None where there is no bar, or too few pairs."""
    if bar.limit is None or pairs < LEAST_PAIRS:
        return None
    return reaches(high if bar.sense == "at least" else low, bar.limit, bar.sense)


def ratio_of(bar: Bar, samples: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """A bar's ratio with its interval, as plain data."""
    pairs = zip(samples[bar.above], samples[bar.below], strict=True)
    ratios = [above / below for above, below in pairs]
    low, high = interval(ratios)
    return {
        "above": bar.above,
        "below": bar.below,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "limit": bar.limit,
        "sense": bar.sense,
        "met": is_met(bar, len(ratios), low, high),
    }


def take_turns(
    contestants: Mapping[str, Contestant],
    bars: Sequence[Bar],
    *,
    rounds: int,
    unit: str,
    keep: Keep,
) -> dict[str, Any]:
    """Measure every contestant once a round; every second round goes backwards.

    So neighbours stay neighbours, and of two contestants each comes first as often as the other.

    Args:
        contestants: by name, in the order in which they are shown and measured.
        bars: those that name somebody who is not here are left out.
        rounds: how often.
        unit: of a contestant's figure.
        keep: called after every round, so that what was measured outlives an interruption.
    """
    names = list(contestants)
    present = [bar for bar in bars if bar.above in contestants and bar.below in contestants]
    samples: dict[str, list[float]] = {name: [] for name in names}
    result: dict[str, Any] = {}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(contestants[name](number))
        result = {
            "unit": unit,
            "rounds": number + 1,
            "samples": samples,
            "medians": {name: statistics.median(values) for name, values in samples.items()},
            "ratios": [ratio_of(bar, samples) for bar in present],
        }
        keep(result)
    return result
