"""What the bodies of all generation routes say alike about sampling. Knows no route and no adapter."""

from __future__ import annotations

import secrets
from typing import Any, Protocol, TypeVar

from server.engine.request import SamplingParams

ValueT = TypeVar("ValueT")


class SamplingFields(Protocol):
    """The fields that TGI's parameters and OpenAI's bodies have in common; None is left out."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None


def sampling_of(fields: SamplingFields, *, do_sample: bool, **others: Any) -> SamplingParams:
    """The engine's parameters of the first sample.

    Args:
        fields: checked by their schema. A temperature of 0 (greedy) and a top_k of -1 (every token)
            are neutral here.
        do_sample: see SamplingParams; a seed is drawn where it is wanted and none was given.
        others: SamplingParams' other fields.
    """
    seed = fields.seed
    if seed is None:
        # 53 bits: every JSON reader gets the seed back that was used.
        seed = secrets.randbits(53) if do_sample else 0
    return SamplingParams(
        do_sample=do_sample,
        temperature=fields.temperature or 1.0,
        top_k=max(0, _or(fields.top_k, 0)),
        top_p=_or(fields.top_p, 1.0),
        min_p=_or(fields.min_p, 0.0),
        typical_p=_or(fields.typical_p, 1.0),
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        presence_penalty=_or(fields.presence_penalty, 0.0),
        frequency_penalty=_or(fields.frequency_penalty, 0.0),
        seed=seed,
        **others,
    )


def _or(value: ValueT | None, neutral: ValueT) -> ValueT:
    return neutral if value is None else value
