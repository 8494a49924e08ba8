"""The life of a training job, as data.

    queued -> running, cancelled
    running -> queued, succeeded, failed, cancelled
    succeeded ->
    failed ->
    cancelled ->

Running goes back to queued when a worker hands its job back (a server that shuts down). A job whose
worker was lost stays running; another worker claims it. Nothing here knows tables or processes.
"""

from __future__ import annotations

from typing import Literal

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]

TRANSITIONS: dict[State, frozenset[State]] = {
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"queued", "succeeded", "failed", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}

# What nothing leads out of.
FINISHED: frozenset[State] = frozenset(state for state, after in TRANSITIONS.items() if not after)


def check_transition(before: State, after: State) -> None:
    """Refuse a change that the table does not have.

    Raises:
        ValueError: a mistake in the code that asked for it.
    """
    if after not in TRANSITIONS[before]:
        raise ValueError(f"a job never goes from {before} to {after}")
