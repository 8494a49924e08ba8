"""What a request made the engine do: in the reply's headers, and in the request's log line.

A route notes its generations as soon as they begin; they are read when the reply has ended. Knows no route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import HTTPConnection
from starlette.types import Scope

if TYPE_CHECKING:
    from server.generation.generator import Generation

_STATE = "work"


@dataclass(frozen=True)
class _Work:
    prompt_tokens: int
    # The route's own list, to which it adds what it begins later.
    generations: Sequence[Generation]
    labels_ranked: int | None


def note_work(
    connection: HTTPConnection,
    prompt_tokens: int,
    generations: Sequence[Generation],
    *,
    labels_ranked: int | None = None,
) -> None:
    """Note what a request has begun.

    Args:
        connection: the request.
        prompt_tokens: of all its prompts, each once; virtual tokens are not among them.
        generations: those begun so far; the list may grow.
        labels_ranked: of a request that ranks, in place of generated tokens.
    """
    setattr(connection.state, _STATE, _Work(prompt_tokens, generations, labels_ranked))


def work_facts(scope: Scope) -> dict[str, int]:
    """Times in milliseconds and numbers of tokens, for the log; empty if the engine did nothing."""
    work: _Work | None = scope["state"].get(_STATE)
    if work is None or not work.generations:
        return {}
    queue, first_token = _times(work.generations)
    known = {
        "queue_milliseconds": queue,
        "first_token_milliseconds": first_token,
        "prompt_tokens": work.prompt_tokens,
    }
    if work.labels_ranked is None:
        known["generated_tokens"] = sum(one.num_tokens for one in work.generations)
    else:
        known["labels_ranked"] = work.labels_ranked
    return {name: value for name, value in known.items() if value is not None}


def timing_headers(*generations: Generation) -> dict[str, str]:
    """`x-queue-time` and `x-time-to-first-token`, in milliseconds as TGI's are.

    Of several generations, those of the one whose first token came first; both times begin at the
    submission to the engine. Unknown times are left out.
    """
    queue, first_token = _times(generations)
    known = {"x-queue-time": queue, "x-time-to-first-token": first_token}
    return {name: str(value) for name, value in known.items() if value is not None}


def _times(generations: Sequence[Generation]) -> tuple[int | None, int | None]:
    begun = [one for one in generations if one.first_token_seconds is not None]
    if not begun:
        return None, None
    first = min(begun, key=lambda one: one.first_token_seconds or 0.0)
    return _milliseconds(first.queue_seconds), _milliseconds(first.first_token_seconds)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
