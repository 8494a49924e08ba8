"""Clients that get in each other's way over HTTP, and a database that another process holds.

One server of its own; its collector runs all the time, so that what is deleted leaves the disk while
others load it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.storage_server import answer, wait_for
from tests.server.conftest import make_settings
from tests.server.http_server import (
    ServerClient,
    running_server,
    save_prefix_adapter,
    save_tiny_base,
    upload,
)

pytestmark = pytest.mark.slow

ROUNDS = 200


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("races")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[ServerClient]:
    """With the adapter `good`."""
    settings = make_settings(save_tiny_base(home / "base"), home / "data")
    with running_server(settings, collect_seconds=0.002) as client:
        assert upload(client, save_prefix_adapter(home / "good", seed=1), "good").status_code == 201
        yield client


def _add(client: httpx.Client, home: Path, name: str, seed: int) -> httpx.Response:
    folder = home / f"seed-{seed}"
    if not folder.exists():
        save_prefix_adapter(folder, seed=seed)
    return upload(client, folder, name)


def _at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def _whole(server: ServerClient) -> None:
    """Rows and bytes are the same adapters once what was deleted is collected; nothing is damaged."""
    registry = server.app_services().registry
    data = server.app_services().settings.data_dir
    records = [one for name in registry.list(limit=1000) for one in registry.versions(name.name)]
    digests = {one.digest for one in records}
    wait_for(lambda: {path.name for path in (data / "blobs").iterdir()} <= digests, 90)
    assert {path.name for path in (data / "blobs").iterdir()} == digests
    assert all(registry.verify(one.digest) for one in records)
    assert list((data / "staging").iterdir()) == []


def test_twenty_uploads_of_one_name_at_once(server: ServerClient, home: Path) -> None:
    before = answer(server, "good")
    for seed in (2, *range(10, 30)):
        save_prefix_adapter(home / f"seed-{seed}", seed=seed)
    replies = _at_once([lambda: _add(server, home, "same", 2)] * 20)
    assert sorted(reply.status_code for reply in replies) == [200] * 19 + [201]
    assert {reply.json()["version"] for reply in replies} == {1}
    replies = _at_once([lambda s=s: _add(server, home, "many", s) for s in range(10, 30)])
    assert [reply.status_code for reply in replies] == [201] * 20
    assert sorted(reply.json()["version"] for reply in replies) == list(range(1, 21))
    listed = {one["version"]: one["digest"] for one in _versions(server, "many")}
    assert listed == {reply.json()["version"]: reply.json()["digest"] for reply in replies}
    assert answer(server, "good") == before
    _whole(server)


def _versions(client: httpx.Client, name: str) -> list[dict[str, Any]]:
    versions: list[dict[str, Any]] = client.get(f"/adapters/{name}").json()["versions"]
    return versions


def test_deleting_while_others_load_and_generate(server: ServerClient, home: Path) -> None:
    """Each round: an adapter comes, and is deleted, unloaded, loaded and asked at once."""
    before = answer(server, "good")
    _add(server, home, "fleeting", 3)
    right = answer(server, "fleeting")
    ids = [token["id"] for token in right]
    generator = server.app_services().generator
    assert generator is not None
    server.delete("/adapters/fleeting")
    body = {"inputs": "the tweet is", "parameters": {"max_new_tokens": 6, "details": True}}

    def generate() -> str:
        reply = server.post("/generate?adapter=fleeting", json=body)
        if reply.status_code == 404:
            return "gone"
        assert reply.status_code == 200, reply.text
        # Who shares a step moves the last digit of a log-probability, never a token.
        assert [token["id"] for token in reply.json()["details"]["tokens"]] == ids
        return "answered"

    def move(verb: str) -> str:
        reply = server.post(f"/adapters/fleeting/{verb}")
        assert reply.status_code in (202, 404), reply.text
        return verb

    def delete() -> str:
        assert server.delete("/adapters/fleeting").status_code == 200
        return "deleted"

    seen: set[str] = set()
    with ThreadPoolExecutor(6) as pool:
        for _ in range(ROUNDS):
            assert _add(server, home, "fleeting", 3).status_code == 201
            work = [pool.submit(generate), pool.submit(move, "preload")]
            work += [pool.submit(generate), pool.submit(delete)]
            work += [pool.submit(move, "unload"), pool.submit(generate)]
            seen |= {one.result() for one in work}
            generator._resolved_at.clear()  # a minute later: the collector may have the bytes
    assert {"gone", "answered", "deleted"} <= seen
    assert answer(server, "good") == before
    assert _add(server, home, "fleeting", 3).json()["version"] == ROUNDS + 2
    assert answer(server, "fleeting") == right
    _whole(server)


def test_rolling_back_while_new_versions_come(server: ServerClient, home: Path) -> None:
    """A bare name is the version of the last one to speak, and never none."""
    _add(server, home, "rolled", 4)
    for number in range(20):
        replies = _at_once(
            [
                lambda n=number: _add(server, home, "rolled", 100 + n),
                lambda: server.post("/adapters/rolled/rollback", json={"version": 1}),
                lambda: server.post("/generate?adapter=rolled", json={"inputs": "x"}),
            ]
        )
        assert [reply.status_code for reply in replies] == [201, 200, 200]
        newest = replies[0].json()["version"]
        assert newest == number + 2
        assert int(replies[2].headers["x-adapter-version"]) in (1, newest - 1, newest)
        now = server.get("/adapters/rolled").json()
        assert now["version"] in (1, newest)
        assert [one["is_default"] for one in now["versions"]].count(True) == 1
    assert len(_versions(server, "rolled")) == 21
    _whole(server)


def test_a_database_that_another_process_holds(server: ServerClient, home: Path) -> None:
    """Writers wait for it, more of them than there are threads; generation does not."""
    before = answer(server, "good")
    data = server.app_services().settings.data_dir
    other = sqlite3.connect(data / "registry.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    limits = httpx.Limits(max_connections=100)
    save_prefix_adapter(home / "seed-5", seed=5)
    with (
        httpx.Client(base_url=server.base_url, timeout=60, limits=limits) as client,
        ThreadPoolExecutor(60) as pool,
    ):
        try:
            writers = [
                pool.submit(
                    client.put, f"/adapters/good/aliases/held-{number}", json={"version": 1}
                )
                for number in range(50)
            ]
            writers.append(pool.submit(_add, client, home, "held", 5))
            time.sleep(1)
            answers = [answer(server, "good") for _ in range(3)]
            waited = [writer.done() for writer in writers]
        finally:
            other.execute("ROLLBACK")
            other.close()
        assert answers == [before] * 3
        assert not any(waited)
        assert {writer.result().status_code for writer in writers} == {200, 201}
    assert len(server.get("/adapters/good").json()["aliases"]) == 50
    _whole(server)
