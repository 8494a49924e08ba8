"""Observer interfaces for generations, implemented by metrics, traces and quotas.

Every generation of every route passes `Generator.submit`, the single place that notifies observers. All
calls are made on the event loop; they must return immediately and not raise. Independent of HTTP and
Prometheus.
"""

from __future__ import annotations

from typing import Literal, Protocol

from server.engine.request import GenerationRequest
from server.store.caller import Caller

# vLLM's terms: "stop" is the end-of-sequence token or a stop string, "abort" a disconnected caller.
Ended = Literal["stop", "length", "abort", "error"]


class GenerationObserver(Protocol):
    """Observes one generation: `first_token` and `token` as tokens are read, then `ended` once."""

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        """The first token arrived.

        Args:
            seconds: time since submission to the engine.
            queue_seconds: queueing time before the first step, included in `seconds`.
        """
        ...

    def token(self, seconds: float) -> None:
        """Another token arrived, `seconds` after the previous one."""
        ...

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        """The generation ended; the last call.

        Args:
            how: how it ended.
            seconds: time from submission to the last token, or to the failure.
            code: as in `FailedEvent`, if it failed.
        """
        ...


class _Ignored:
    """A `GenerationObserver` that looks at nothing."""

    def first_token(self, seconds: float, queue_seconds: float | None) -> None:
        pass

    def token(self, seconds: float) -> None:
        pass

    def ended(self, how: Ended, seconds: float, code: str | None) -> None:
        pass


# For generations of which only the start matters to an observer, or nothing.
IGNORED: GenerationObserver = _Ignored()


class Observer(Protocol):
    """Observes all generations."""

    def began(self, request: GenerationRequest, caller: Caller, /) -> GenerationObserver:
        """A request was submitted to the engine."""
        ...

    def refused(self, adapter: str | None, code: str) -> None:
        """A generation was refused before it started.

        Args:
            adapter: its name; None is the base.
            code: "overloaded", "engine_unavailable", "adapter_corrupt" or "base_mismatch".
        """
        ...
