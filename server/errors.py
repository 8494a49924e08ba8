"""What the server itself refuses, as opposed to the adapter library and the engine.

    RequestRefused           anything the server refuses on its own account
    |-- Contradiction        two parts of a request disagree, or a field is where none belongs
    |-- UnknownParameter     a query parameter that the route does not have
    |-- RequestInvalid       a value that is out of range, missing or of the wrong kind
    |   `-- TooLong          more tokens than the base or the engine can hold
    |-- BodyTooLarge         more bytes than the limit, counted while they arrive
    |-- WrongContentType     a body of another media type
    |-- RequestTimeout       headers or a body that came too slowly
    |-- UrlTooLong           a longer URL than may be
    |-- HeadersTooLarge      more headers, or more bytes of them, than may be
    |-- TooManyConnections   as many connections are open as may
    |-- NotReady             the engine is still starting, or is gone
    |-- JobNotFound          no training job of that id
    |-- UploadNotFound       no uploaded file of that id
    |-- FilesFull            as many uploaded files, or bytes of them, are kept as may
    |-- JobActive            the job has to end first
    |-- TooManyJobs          as many jobs wait already as may
    |-- LoadingDisabled      the operator allows no directory to load adapters from
    |-- FolderNotFound       no folder inside the directories that an operator allows
    |-- NotLoaded            the adapter is not one that a client loaded from a folder
    |-- KeyRequired          no API key, or none that is good
    |-- ScopeMissing         a good key that may not do this
    |-- RateLimited          more requests than the key may make in a time
    |-- QuotaExceeded        the key has used as many tokens as it may in a time
    |-- KeyInvalid           a key that cannot be made so (never told to a client, as the next)
    `-- KeyNotFound          no key of that id
    LeaseLost                a worker's claim on its job is no longer good (never told to a client)

Every error carries facts as plain attributes, as those of `adapters.errors` do; nothing here knows
a status code: `server.api.error_replies` holds the one table.
"""

from __future__ import annotations

from adapters.errors import Refused


class RequestRefused(Refused):
    """Base of the tree."""


class Contradiction(RequestRefused):
    """Two parts of a request disagree, or a field is where none belongs."""


class UnknownParameter(RequestRefused):
    """A query parameter that the route does not have."""


class RequestInvalid(RequestRefused):
    """A value that is out of range, missing or of the wrong kind."""


class TooLong(RequestInvalid):
    """More tokens than the base or the engine can hold."""


class BodyTooLarge(RequestRefused):
    """More bytes than the limit, counted while they arrive."""


class WrongContentType(RequestRefused):
    """A body of another media type."""


class RequestTimeout(RequestRefused):
    """Headers or a body that came too slowly."""


class UrlTooLong(RequestRefused):
    """A longer URL than may be."""


class HeadersTooLarge(RequestRefused):
    """More headers, or more bytes of them, than may be."""


class TooManyConnections(RequestRefused):
    """As many connections are open as may."""

    def __init__(self, max_connections: int) -> None:
        super().__init__(
            f"{max_connections} connections are open, which is as many as the server takes"
        )


class NotReady(RequestRefused):
    """The engine is still starting, or is gone."""


class JobNotFound(RequestRefused):
    """No training job of that id."""


class UploadNotFound(RequestRefused):
    """No uploaded file of that id."""


class FilesFull(RequestRefused):
    """As many uploaded files, or bytes of them, are kept as may."""


class JobActive(RequestRefused):
    """The training job has to end first."""


class TooManyJobs(RequestRefused):
    """As many training jobs wait already as may."""


class LoadingDisabled(RequestRefused):
    """The operator allows no directory to load adapters from."""


class FolderNotFound(RequestRefused):
    """No folder inside the directories that an operator allows."""


class NotLoaded(RequestRefused):
    """The adapter is not one that a client loaded from a folder."""


class KeyRequired(RequestRefused):
    """No API key, or none that is good; the same words for every reason."""

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is required: send it as Authorization: Bearer KEY, or as x-api-key"
        )


class ScopeMissing(RequestRefused):
    """A good key that may not do this."""


class RateLimited(RequestRefused):
    """More requests than the key may make in a time.

    Attributes:
        retry_after_seconds: when to try again.
    """

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaExceeded(RateLimited):
    """The key has used as many tokens as it may in a time."""


class KeyInvalid(RequestRefused):
    """A key that cannot be made so."""


class KeyNotFound(RequestRefused):
    """No key of that id."""


class LeaseLost(Exception):
    """A worker's claim on its job is no longer good: another has it, or it has ended."""
