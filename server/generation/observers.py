"""Who is told of generations, and what: the two interfaces behind metrics and traces.

Every generation of every route passes `Generator.submit`, so it is told once and by one piece of code.
All calls come on the event loop; they must return at once and raise nothing. Knows neither HTTP nor
Prometheus.
"""

from __future__ import annotations

from typing import Literal, Protocol

from server.engine.request import GenerationRequest

# vLLM's words: "stop" is the end-of-sequence token or a stop string, "abort" a caller that left.
Ended = Literal["stop", "length", "abort", "error"]


class Watch(Protocol):
    """One generation. `first_token` and `token` come as tokens are read, `ended` once and last."""

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        """The first token came.

        Args:
            seconds: since the engine was asked.
            queue_seconds: of which the request waited for its first step.
        """
        ...

    def token(self, seconds: float) -> None:
        """Another token came, so long after the one before."""
        ...

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        """Nothing follows.

        Args:
            how: it ended.
            seconds: from asking the engine to the last token, or to the failure.
            code: as in `FailedEvent`, where it failed.
        """
        ...


class Watcher(Protocol):
    """Told of all generations."""

    def began(self, request: GenerationRequest) -> Watch:
        """A request was handed to the engine."""
        ...

    def refused(self, adapter: str | None, code: str) -> None:
        """A generation was not begun.

        Args:
            adapter: its name; None is the base.
            code: "overloaded", "engine_unavailable", "adapter_corrupt" or "base_mismatch".
        """
        ...
