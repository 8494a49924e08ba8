"""One server for every hostile case, and a look at what it holds before and after each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile.served import MIB, Held, Served, serving
from tests.server.http_server import save_tiny_base

# What each process may hold more at the end of all cases than before the first: what allocators keep of
# the largest uploads, but no case's memory twice.
MOST_MORE_BYTES = 96 * MIB
MOST_MORE_THREADS = 8


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    home: Path = tmp_path_factory.mktemp("hostile")
    base = save_tiny_base(tmp_path_factory.mktemp("hostile-base"))
    with serving(base, home / "served") as server:
        _warm_up(server)
        before = server.weights()
        yield server
        after = server.weights()
        assert after.keys() <= before.keys()
        for name, now in after.items():
            was = before[name]
            assert now.private_bytes - was.private_bytes < MOST_MORE_BYTES, (name, before, after)
            assert now.threads - was.threads <= MOST_MORE_THREADS, (name, before, after)


@pytest.fixture(scope="session")
def at_first(served) -> Held:
    """What the server holds when everything has been used once."""
    return served.held()


@pytest.fixture
def unharmed(served, at_first) -> Iterator[Served]:
    """The server; after the test it holds what it held before, and it answers."""
    before = replace(at_first, files=(now := served.held()).files, rows=now.rows)
    yield served
    assert served.process.poll() is None, served.log.read_text()[-2000:]
    after = served.settled(before)
    assert after.no_more_than(before), (before, after)
    with served.client() as client:
        assert client.get("/health").status_code == 200


def _warm_up(served: Served) -> None:
    """Everything once that is loaded on its first use."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    body = {"model": "tiny-base", "max_tokens": 2}
    with served.client() as client:
        for adapter in ("complaints", "other"):
            client.post(f"/generate?adapter={adapter}", json={"inputs": "a"})
            client.post(f"/classify?adapter={adapter}", json={"inputs": "a"})
        for _ in range(2):
            client.post("/v1/completions", json={**body, "prompt": "a", "response_format": schema})
        # Each of the compiler's two threads has a process of its own that checks grammars.
        for number in range(1, 9):
            grammar = {"type": "regex", "value": f"[a-z]{{{number}}}"}
            client.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}})
