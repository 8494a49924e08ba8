"""The adapters of a running server, for the command line. Knows the routes, and prints nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from adapters.errors import AdapterNotFound, BaseMismatch, VersionNotFound
from server.cli.adapter_backends import Shown, Source, Weighted, split_reference, staged
from server.cli.http_client import RemoteServer, is_segment

if TYPE_CHECKING:
    from adapters.combine import CombinationType

# What an upload's form has a field for, of the words that a folder brings along.
_FORM_WORDS = (
    "description",
    "template",
    "labels",
    "target_separator",
    "append_eos",
    "tokenization",
)
_PAGE = 1000


class RunningServer:
    """The adapters of a running server.

    Args:
        server: closed together with this.
    """

    def __init__(self, server: RemoteServer) -> None:
        self._server = server

    def close(self) -> None:
        """Close all connections."""
        self._server.close()

    def list(self) -> list[Shown]:
        """See `AdapterPlace`."""
        found: list[Shown] = []
        while True:
            page = self._server.get("/adapters", offset=len(found), limit=_PAGE)
            found += page["adapters"]
            if not page["adapters"] or len(found) >= page["total"]:
                return found

    def show(self, reference: str) -> Shown:
        """See `AdapterPlace`; `counters` too, and no `config` of a version that is not default."""
        name, which = split_reference(reference)
        shown: Shown = self._server.get(_path(name))
        if which is None:
            return shown
        for one in shown["versions"]:
            if which in (str(one["version"]), *one["aliases"]):
                config = shown["config"] if one["is_default"] else None
                return {**shown, **one, "config": config}
        raise VersionNotFound(f"adapter {name!r} has no version or alias {which!r}")

    def add(self, source: Source) -> Shown:
        """See `AdapterPlace`.

        Raises:
            BaseMismatch: it was trained here on another base than the server's.
        """
        self._require_base(source.words.get("base_digest"))
        with staged(source.path) as (directory, ignored):
            files = [("files", file.name, file) for file in sorted(directory.iterdir())]
            fields = {"name": source.name, **_form(source.words)}
            status, shown = self._server.upload("/adapters", fields, files)
        return {**shown, "created": status == 201, "ignored_files": [*ignored]}

    def remove(self, name: str, version: int | None) -> Shown:
        """See `AdapterPlace`."""
        gone: Shown = self._server.delete(_path(name), version=version)
        return gone

    def rollback(self, name: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        shown: Shown = self._server.post(f"{_path(name)}/rollback", {"version": version})
        return shown

    def set_alias(self, name: str, alias: str, version: int) -> Shown:
        """See `AdapterPlace`."""
        route = f"{_path(name)}/aliases/{quote(alias, safe='')}"
        shown: Shown = self._server.put(route, {"version": version})
        return shown

    def download(self, reference: str, target: Path) -> Shown:
        """See `AdapterPlace`."""
        shown = self.show(reference)
        route = f"{_path(shown['name'])}/download"
        self._server.download(route, target, version=shown["version"])
        return shown

    def combine(
        self,
        parts: Sequence[Weighted],
        name: str,
        combination_type: CombinationType,
        words: dict[str, Any],
    ) -> Shown:
        """See `AdapterPlace`."""
        body = {
            **words,
            "adapters": [part.reference for part in parts],
            "weights": [part.weight for part in parts],
            "name": name,
            "combination_type": combination_type,
        }
        shown: Shown = self._server.post("/adapters/combine", body)
        return shown

    def move(self, reference: str, where: str) -> Shown:
        """Bring an adapter to the device ("preload") or let it leave ("unload"); its record."""
        name, which = split_reference(reference)
        version = None if which is None else self.show(reference)["version"]
        shown: Shown = self._server.post(f"{_path(name)}/{where}", version=version)
        return shown

    def _require_base(self, digest: str | None) -> None:
        if digest is None:
            return
        served = self._server.get("/info")["base"]["digest"]
        if served != digest:
            raise BaseMismatch(
                f"the adapter was trained on base {digest}, {served} is served there",
                field="base_digest",
                expected=served,
                came=digest,
            )


def _path(name: str) -> str:
    if not is_segment(name):
        raise AdapterNotFound(f"there is no adapter {name!r}", field="adapter", came=name)
    return f"/adapters/{quote(name, safe='')}"


def _form(words: dict[str, Any]) -> dict[str, str]:
    """Words as form fields: texts as they are, the others as JSON."""
    return {
        name: words[name] if isinstance(words[name], str) else json.dumps(words[name])
        for name in _FORM_WORDS
        if words.get(name) is not None
    }
