"""Who makes a request, and what of the stores it may see.

A `Caller` is made once per request by `server.api.middleware.authentication` and passed on: a route is
handed `Services`, and each store in it, as its caller sees them (`seen_by`). Code outside a request
(startup, the watched directory, a training worker, the command line) is `UNRESTRICTED`, as is every
request on a server without authentication.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Self

from server.store.key import Key


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        key: its API key; None is unrestricted.
    """

    key: Key | None = None

    @property
    def adapters(self) -> tuple[str, ...] | None:
        """Adapter names, and name prefixes ending in `*`, that it may see; None is all."""
        return None if self.key is None else self.key.adapters

    @property
    def owner(self) -> str | None:
        """The owner recorded for what it creates; None is no owner."""
        return None if self.key is None else self.key.owner

    @property
    def only_owner(self) -> str | None:
        """The owner whose files and jobs it may see; None is all."""
        return None if self.key is None or self.key.may(()) else self.key.owner


UNRESTRICTED = Caller()


class PerCaller:
    """What callers see differently: a store, or what works with one. Unrestricted until `seen_by`."""

    _caller: Caller = UNRESTRICTED

    def seen_by(self, caller: Caller) -> Self:
        """The same as a caller sees it; both share everything else."""
        view = copy.copy(self)
        view._caller = caller
        return view
