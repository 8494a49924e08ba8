"""What the asyncio side of the engine raises. Knows nothing of how it comes to that.

A call from Python has kinds of its own under the same base, in `python_calls`.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of what the client and calls from Python raise.

    |-- EngineStartFailed   the process could not start; the message gives the reason
    |-- EngineUnavailable   the process is not running
    |-- EngineOverloaded    the queue is full
    |   `-- AdapterOverloaded   as many requests for one adapter run or wait as may
    `-- RequestFailed       one request ended without tokens
    """


class EngineStartFailed(EngineError):
    """The process could not start; `kind` is the class name of what it raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class EngineUnavailable(EngineError):
    """The process is not running."""


class EngineOverloaded(EngineError):
    """The queue is full.

    Attributes:
        retry_after_seconds: when to try again.
    """

    def __init__(self, retry_after_seconds: int, why: str = "the queue is full") -> None:
        super().__init__(f"{why}; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class AdapterOverloaded(EngineOverloaded):
    """The limit of requests for one adapter is reached; requests for others are accepted.

    Args:
        adapter: its name; None is the base.
        number: of those requests.
        retry_after_seconds: when to try again.
    """

    def __init__(self, adapter: str | None, number: int, retry_after_seconds: int) -> None:
        whose = "the base" if adapter is None else f"the adapter {adapter!r}"
        super().__init__(
            retry_after_seconds, f"{number} requests for {whose} run or wait, which is the limit"
        )


class RequestFailed(EngineError):
    """One request ended without more tokens; `code` as in `FailedEvent`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
