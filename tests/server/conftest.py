"""Fixtures that the server's tests share: one tiny base, one running server."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config.settings import Settings
from tests.server.http_server import (
    running_server,
    save_prefix_adapter,
    save_tiny_base,
    upload,
)

TEMPLATE = "Tweet text : {Tweet text} Label : "


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("tiny-base"))


def make_settings(base: Path, data_dir: Path, **changes) -> Settings:
    return Settings(
        **{
            "base": str(base),
            "base_name": "tiny-base",
            "data_dir": data_dir,
            "dtype": "float32",
            "threads": 1,
            "max_running": 8,
            "kv_mib": 16,
            "log_level": "error",
            **changes,
        }
    )


@pytest.fixture(scope="session")
def server(tiny_base, tmp_path_factory):
    """A server with the adapters `complaints` (with a template) and `other`."""
    home = tmp_path_factory.mktemp("server")
    with running_server(make_settings(tiny_base, home / "data")) as client:
        for seed, name, fields in (
            (1, "complaints", {"template": TEMPLATE, "labels": '["complaint", "no complaint"]'}),
            (2, "other", {}),
        ):
            reply = upload(client, save_prefix_adapter(home / name, seed=seed), name, **fields)
            assert reply.status_code == 201, reply.text
        yield client
