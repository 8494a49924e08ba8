"""The contract between the listening server and the application: keys of the request's state, refusals.

The protocol sets values in `scope["state"]`; middleware and streams read them. Independent of routes,
middleware and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

# Sends a frame of a started reply; False if it was not sent and ASGI's `send` must send it.
SendNow: TypeAlias = Callable[[bytes], bool]

# Key of a `SendNow`, if the listening server has one. Middleware only needs a reply's start and end,
# and frames come by the thousand: they bypass it.
SEND_NOW = "send_now"
# Key of the limit on connections, set on a connection above it.
CROWDED = "too_many_connections"
# Value of `x-adapter-id` and `x-adapter-version` on replies without an adapter. Not a valid name.
NO_ADAPTER = "-"


@dataclass(frozen=True)
class RefusalReply:
    """A refusal that is sent before the application sees the request.

    Attributes:
        status: HTTP status.
        code: stable name, for logs and metrics.
        headers: in addition to those of every reply.
        body: JSON in UTF-8.
    """

    status: int
    code: str
    headers: Mapping[str, str]
    body: bytes


# Writes an error in the format that clients of a path expect.
RefusalWriter: TypeAlias = Callable[[Exception, str], RefusalReply]
