"""Refusals of the server itself, as opposed to those of the adapter library and the engine.

    RequestRefused           base of the tree
    |-- Contradiction        two parts of a request disagree, or a field that does not belong where it is
    |-- UnknownParameter     a query parameter that the route does not have
    |-- RequestInvalid       a value that is missing, out of range or of the wrong type
    |   `-- TooLong          more tokens than fit the base or the engine
    |-- BodyTooLarge         more bytes than the limit, counted while they arrive
    |-- WrongContentType     a body of another media type
    |-- RequestTimeout       headers or a body that came too slowly
    |-- UrlTooLong           a URL over its limit
    |-- HeadersTooLarge      headers over their number or size limit
    |-- TooManyConnections   the limit of open connections is reached
    |-- NotReady             the engine is starting, or is down
    |-- JobNotFound          no training job of that id
    |-- UploadNotFound       no uploaded file of that id
    |-- ResponseNotFound     responses of /v1/responses are not stored
    |-- NoEmbeddings         the base makes none
    |-- FilesFull            the limit of uploaded files, or of their bytes, is reached
    |-- JobActive            the job must end first
    |-- TooManyJobs          the limit of queued jobs is reached
    |-- TooManyAliases       the limit of an adapter's aliases is reached
    |-- LoadingDisabled      no directory to load adapters from is configured
    |-- FolderNotFound       no such folder in the configured directories
    |-- NotLoaded            the adapter was not loaded from a folder by a client
    |-- KeyRequired          no API key, or an invalid one
    |-- HostRefused          a Host header that is no name of this server
    |-- OriginRefused        a web page of another site sent the request
    |-- ScopeMissing         a valid key without the required scope
    |-- RateLimited          the key's request limit is exceeded
    |-- QuotaExceeded        the key's token quota is used up
    |-- KeyInvalid           a key that cannot be created (not sent to clients, as the next)
    `-- KeyNotFound          no key of that id
    LeaseLost                a worker's claim on its job is no longer valid (not sent to clients)

Errors carry facts as plain attributes, as those of `adapters.errors` do. Independent of status codes:
`server.api.error_replies` has the table.
"""

from __future__ import annotations

from adapters.errors import Refused


class RequestRefused(Refused):
    """Base of the tree."""


class Contradiction(RequestRefused):
    """Two parts of a request disagree, or a field that does not belong where it is."""


class UnknownParameter(RequestRefused):
    """A query parameter that the route does not have."""


class RequestInvalid(RequestRefused):
    """A value that is out of range, missing or of the wrong kind."""


class TooLong(RequestInvalid):
    """More tokens than fit the base or the engine."""


class BodyTooLarge(RequestRefused):
    """More bytes than the limit, counted while they arrive."""


class WrongContentType(RequestRefused):
    """A body of another media type."""


class RequestTimeout(RequestRefused):
    """Headers or a body that came too slowly."""


class UrlTooLong(RequestRefused):
    """A URL over its limit."""


class HeadersTooLarge(RequestRefused):
    """Headers over their number or size limit."""


class TooManyConnections(RequestRefused):
    """The limit of open connections is reached."""

    def __init__(self, max_connections: int) -> None:
        super().__init__(
            f"{max_connections} connections are open, which is as many as the server takes"
        )


class NotReady(RequestRefused):
    """The engine is starting, or is down."""


class JobNotFound(RequestRefused):
    """No training job of that id."""


class UploadNotFound(RequestRefused):
    """No uploaded file of that id."""


class ResponseNotFound(RequestRefused):
    """Responses of /v1/responses are not stored."""


class NoEmbeddings(RequestRefused):
    """The base is a decoder, which makes no embeddings."""


class FilesFull(RequestRefused):
    """The limit of uploaded files, or of their bytes, is reached."""


class JobActive(RequestRefused):
    """The training job must end first."""


class TooManyJobs(RequestRefused):
    """The limit of queued training jobs is reached."""


class TooManyAliases(RequestRefused):
    """The limit of an adapter's aliases is reached."""


class LoadingDisabled(RequestRefused):
    """No directory to load adapters from is configured."""


class FolderNotFound(RequestRefused):
    """No such folder in the configured directories."""


class NotLoaded(RequestRefused):
    """The adapter was not loaded from a folder by a client."""


class KeyRequired(RequestRefused):
    """No API key, or an invalid one; the same message for every reason."""

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is required: send it as Authorization: Bearer KEY, or as x-api-key"
        )


class HostRefused(RequestRefused):
    """The Host header is no name of this server."""


class OriginRefused(RequestRefused):
    """A web page of another site sent the request."""


class ScopeMissing(RequestRefused):
    """A valid key without the required scope."""


class RateLimited(RequestRefused):
    """The key's request limit is exceeded.

    Attributes:
        retry_after_seconds: time until the next request may succeed.
    """

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class QuotaExceeded(RateLimited):
    """The key's token quota is used up."""


class KeyInvalid(RequestRefused):
    """A key that cannot be created."""


class KeyNotFound(RequestRefused):
    """No key of that id."""


class LeaseLost(Exception):
    """A worker's claim on its job is no longer valid: another has it, or it has ended."""
