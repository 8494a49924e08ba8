"""What the asyncio side of the engine raises. Knows nothing of how it comes to that."""

from __future__ import annotations


class EngineError(Exception):
    """Base of what the client raises.

    |-- EngineStartFailed   the process could not start; the message gives the reason
    |-- EngineUnavailable   the process is not running
    |-- EngineOverloaded    the queue is full
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

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class RequestFailed(EngineError):
    """One request ended without more tokens; `code` as in `FailedEvent`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
