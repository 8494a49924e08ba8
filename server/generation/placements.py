"""Where an adapter is, as each of its names has moved it.

The engine knows bytes: two names with equal bytes, perhaps of two tenants, share one place in memory. What
one of them does must neither move the other's adapter nor be seen under the other's name. So an unload
reaches the engine only if no other name uses the bytes, and a name that has not been used since the start
is on disk, wherever the bytes are. An `Observer` of generations; independent of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from server.engine.request import AdapterRef, GenerationRequest
from server.generation.observers import IGNORED, GenerationObserver
from server.store.caller import Caller

Residency = Literal["disk", "host", "device"]


class Placements:
    """The names under which each adapter's bytes were used. Use from one event loop."""

    def __init__(self) -> None:
        # digest -> name -> whether it was used since it was last unloaded
        self._uses: dict[str, dict[str, bool]] = {}

    def use(self, adapter: AdapterRef) -> None:
        """A name's adapter is brought to the device, or is about to generate."""
        self._uses.setdefault(adapter.digest, {})[adapter.name] = True

    def leave(self, digest: str, name: str) -> bool:
        """A name's adapter is to leave the device. Returns whether no other name uses the bytes."""
        uses = self._uses.setdefault(digest, {})
        uses[name] = False
        return not any(uses.values())

    def forget(self, digest: str, name: str) -> None:
        """A name has these bytes no longer."""
        uses = self._uses.get(digest, {})
        uses.pop(name, None)
        if not uses:
            self._uses.pop(digest, None)

    def drop(self, digest: str) -> None:
        """No name has these bytes any longer."""
        self._uses.pop(digest, None)

    def names(self) -> frozenset[str]:
        """Every name that something is known of."""
        return frozenset(name for uses in self._uses.values() for name in uses)

    def forget_names(self, names: Iterable[str]) -> None:
        """Names whose last version was deleted."""
        for name in names:
            for digest in [one for one, uses in self._uses.items() if name in uses]:
                self.forget(digest, name)

    def residency(self, digest: str, name: str, actual: Residency) -> Residency:
        """Where a name's adapter is, given where the bytes are."""
        uses = self._uses.get(digest, {})
        if name not in uses:
            return "disk"
        kept_for_others = not uses[name] and any(uses.values())
        # As it would be had the engine followed the unload.
        return "host" if kept_for_others and actual == "device" else actual

    # --- Observer --------------------------------------------------------------------------

    def began(self, request: GenerationRequest, caller: Caller, /) -> GenerationObserver:
        """A request was submitted to the engine."""
        if request.adapter is not None:
            self.use(request.adapter)
        return IGNORED

    def refused(self, adapter: str | None, code: str) -> None:
        """A refused generation moves nothing."""
