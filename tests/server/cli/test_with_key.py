"""The command line at a server that asks for a key: GRAFTWORK_API_KEY goes with every request."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from server.cli.doctor import machine
from tests.server.cli.runner import refusal, run, run_json
from tests.server.conftest import make_settings
from tests.server.http_server import running_server, save_prefix_adapter


@pytest.fixture(scope="module")
def guarded(tiny_base, tmp_path_factory) -> Iterator[tuple[list[object], str]]:
    """The option that names the server, and a key that may do everything."""
    data = tmp_path_factory.mktemp("guarded") / "data"
    folder = save_prefix_adapter(data.parent / "mine")
    run_json("adapters", "add", folder, "--base", tiny_base, "--data-dir", data)
    words = ["--name", "all", "--data-dir", data]
    for scope in ("generate", "adapters:read", "adapters:write", "train", "admin"):
        words += ["--scope", scope]
    key = run_json("keys", "create", *words)["key"]
    with running_server(make_settings(tiny_base, data, require_keys=True)) as client:
        yield ["--url", client.base_url], key


COMMANDS = [
    ["adapters", "list"],
    ["adapters", "show", "mine"],
    ["adapters", "preload", "mine"],
    ["jobs", "list"],
    ["generate", "-p", "x", "--max-new-tokens", "2"],
    ["bench", "-n", "2", "--adapters", "mine", "--max-new-tokens", "2"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_the_key_goes_with_every_request(guarded, words):
    url, key = guarded
    told = refusal(*words, *url)
    assert "GRAFTWORK_API_KEY" in told
    done = run(*words, *url, "--json", GRAFTWORK_API_KEY=key)
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert key not in done.output


def test_a_key_that_is_none_is_refused_and_never_told(guarded):
    told = refusal("adapters", "list", *guarded[0], GRAFTWORK_API_KEY="gw-secret-and-wrong")
    assert "secret" not in told
    assert "secret" not in run("settings", GRAFTWORK_API_KEY="gw-secret").output


def test_doctor_knows_the_server_with_and_without_a_key(guarded):
    url, key = guarded
    (known,) = machine.check_server(str(url[1]), key)
    assert (known.status, "serves tiny-base" in known.message) == ("ok", True)
    (unknown,) = machine.check_server(str(url[1]), None)
    assert (unknown.status, "GRAFTWORK_API_KEY" in unknown.message) == ("fail", True)
    (taken,) = machine.check_port("127.0.0.1", url[1].port)
    assert (taken.status, "a Graftwork server" in taken.message) == ("ok", True)
    with socket.create_connection(("127.0.0.1", url[1].port)):
        pass  # it still listens
