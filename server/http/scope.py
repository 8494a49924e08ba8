"""What the listening server and the application agree on: keys of the request's state, refusals.

The protocol puts values into `scope["state"]`, middleware and streams read them there. Knows no route,
no middleware and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

# Sends a frame of the reply that has begun; False where it was not sent and ASGI's `send` has to.
SendNow: TypeAlias = Callable[[bytes], bool]

# Key of a `SendNow`, where the listening server has one. The layers between it and a stream look at
# a reply's start and end only, and frames come by the thousand.
SEND_NOW = "send_now"
# Key of the limit on connections, set on a connection above it.
CROWDED = "too_many_connections"
# Value of `x-adapter-id` and `x-adapter-version` on a reply that no model made. Not a possible name.
NO_ADAPTER = "-"


@dataclass(frozen=True)
class RefusalReply:
    """A refusal as it goes out before the application is asked.

    Attributes:
        status: HTTP status.
        code: stable name, for logs and metrics.
        headers: beside those that every reply has.
        body: JSON in UTF-8.
    """

    status: int
    code: str
    headers: Mapping[str, str]
    body: bytes


# Writes an error in the shape that clients of a path expect.
RefusalWriter: TypeAlias = Callable[[Exception, str], RefusalReply]
