"""A server that asks for keys, and keys of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.store.key import SCOPES
from server.store.keys import KeyStore
from tests.server.conftest import make_settings
from tests.server.http_server import ServerClient, running_server, save_prefix_adapter, upload

ADAPTERS = ("complaints", "other", "team-a-x", "team-b-x")
TEMPLATE = "Tweet text : {text} Label :"


# Whose pages may use the server.
PAGE = "https://tools.example"


@dataclass
class Guarded:
    """The server, and its data directory as `graftwork keys` finds it."""

    client: ServerClient
    store: KeyStore
    data_dir: Path

    def key(self, *scopes: str, **options: Any) -> str:
        """The text of a new key."""
        return self.store.create("a test", scopes, **options).text

    def ask(self, method: str, path: str, key: str | None = None, **options: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= options.pop("headers", {})
        return self.client.request(method, path, headers=headers, **options)


@pytest.fixture(scope="session")
def guarded(tiny_base, tmp_path_factory):
    """A server with four adapters; nothing without a key."""
    home = tmp_path_factory.mktemp("guarded")
    data_dir = home / "data"
    data_dir.mkdir()
    store = KeyStore(data_dir)
    settings = make_settings(
        tiny_base, data_dir, require_keys=True, train_workers=0, allowed_origins=(PAGE,)
    )
    with running_server(settings) as client:
        guarded = Guarded(client, store, data_dir)
        client.headers["authorization"] = f"Bearer {guarded.key('admin')}"
        for seed, name in enumerate(ADAPTERS):
            folder = save_prefix_adapter(home / name, seed=seed)
            assert upload(client, folder, name, template=TEMPLATE).status_code == 201
        del client.headers["authorization"]
        yield guarded
    store.close()


@pytest.fixture(scope="session")
def keys(guarded) -> dict[str, str]:
    """A key for each scope, by its name."""
    return {scope: guarded.key(scope) for scope in SCOPES}
