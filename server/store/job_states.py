"""The state machine of a training job, as data.

    queued -> running, cancelled
    running -> queued, succeeded, failed, cancelled
    succeeded ->
    failed ->
    cancelled ->

A running job returns to queued when its worker releases it (on server shutdown). A job whose worker was
lost stays running until another worker claims it. Independent of tables and processes.
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

# Final states.
FINISHED: frozenset[State] = frozenset(state for state, after in TRANSITIONS.items() if not after)


def check_transition(before: State, after: State) -> None:
    """Check that a transition is allowed.

    Raises:
        ValueError: it is not, which is a bug in the calling code.
    """
    if after not in TRANSITIONS[before]:
        raise ValueError(f"a job never goes from {before} to {after}")
